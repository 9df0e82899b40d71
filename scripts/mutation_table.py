"""Write the mutation table of docs/gates.md: wrong linearized graphs of stories260K, and what refuses each.

    python scripts/mutation_table.py [PRECISION ...]        a few minutes on two cores

Every mutation of tests/mutations.py in every layer and precision: the graph is verified as `nbl-export verify` does it,
and its effect is measured, the mean KL between the right linearized graph and the wrong one. A precision's own noise is
the same between PyTorch and the right graph. A mutation that passes with more than twice that ends the script with an
error. With precisions named, the table is printed and the page stays.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from nbl_export import api  # noqa: E402
from nbl_export.calibrate.text import load_text  # noqa: E402
from nbl_export.errors import BuildError  # noqa: E402
from nbl_export.linearize.swap import linearized  # noqa: E402
from nbl_export.progress import Silent  # noqa: E402
from nbl_export.rewrite.confirm import confirm  # noqa: E402
from nbl_export.rewrite.replace import proven_regions, rewrite_file  # noqa: E402
from nbl_export.runtime.ort import ort_stream  # noqa: E402
from nbl_export.runtime.stream import Stream  # noqa: E402
from nbl_export.runtime.torch import torch_stream  # noqa: E402
from nbl_export.settings import VerifySettings  # noqa: E402
from nbl_export.verify.case import PROMPTS, DecoderCase  # noqa: E402
from nbl_export.verify.measure import unlike  # noqa: E402
from nbl_export.verify.parity.compare import Text, log_softmax  # noqa: E402
from nbl_export.verify.parity.unmodified import differences  # noqa: E402
from nbl_export.workspace import Workspace  # noqa: E402
from tests import mutations  # noqa: E402
from tests.finished import made  # noqa: E402
from tests.fixtures_graph import load, plan_by_hand  # noqa: E402
from tests.tiny import build_stories  # noqa: E402

PAGE, BEGIN, END = ROOT / "docs" / "gates.md", "<!-- table -->", "<!-- end of table -->"
DATA = Path(os.environ.get("NBL_EXPORT_SHARED", ROOT.parent / "shared")) / "data"
LAYERS = (1, 3)
COLUMNS = ("fp32", "fp16", "bf16", "int8", "int4")
SETTINGS = VerifySettings(decode_steps=4, quality=False, speed=False)


@dataclass(frozen=True)
class Found:
    """One mutation in one layer: its effect as mean KL, and what refused it."""

    what: str
    kl: float
    confirm: bool
    verify: bool


class Table:
    """The mutations of one precision."""

    def __init__(self, out: Path, model: Any, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.plan = plan_by_hand(out, LAYERS)
        self.baseline = made(out, name, folder / "baseline")
        self.right = folder / "right" / "model.onnx"
        folder.mkdir(parents=True, exist_ok=True)
        rewrite_file(self.baseline, self.plan, self.right)
        self.proofs = proven_regions(self.baseline, self.plan).proofs
        self.tensors = {layer: proof.tensors for layer, proof in self.proofs.items()}
        text = load_text(Workspace.open(out).text)
        self.case = DecoderCase(model, self.plan, self.baseline, self.right, SETTINGS, Silent(), text)
        self.rows = self.case.rows(PROMPTS)
        self.text = Text(self.rows, SETTINGS.decode_steps)
        self.logits = self._logits(ort_stream(self.right, 80))
        with linearized(model, self.plan):
            self.noise = self._kl(self._logits(torch_stream(model, self.plan.linear_attention)), self.logits)
        assert not self._failures(self.right), "the right graph must pass"

    def found(self) -> Iterator[Found]:
        for what, wrong in mutations.OF_WEIGHTS.items():
            for layer in LAYERS:
                path = self.folder / "wrong" / "model.onnx"
                rewrite_file(self.baseline, wrong(self.plan, layer), path)
                yield self._judged(what, path)
        kept = range(len(self.plan.attention_layers))
        for table, numbers in (
            (mutations.OF_LAYERS, LAYERS),
            (mutations.OF_RETAINED, kept),
            (mutations.OF_ALL, (0,)),
        ):
            for what, change in table.items():
                for number in numbers:
                    target = self.right.with_name("wrong.onnx")
                    yield self._judged(what, mutations.changed(self.right, change, number, target))

    def _judged(self, what: str, path: Path) -> Found:
        try:
            confirm(path, self.proofs, self.plan)
            refused = False
        except BuildError:
            refused = True
        effect = self._kl(self.logits, self._logits(ort_stream(path, 80)))
        return Found(what, effect, refused, bool(self._failures(path)))

    def _failures(self, path: Path) -> list[str]:
        case = replace(self.case, rewritten=path)
        return differences(
            self.baseline, path, self.plan, self.tensors, lambda other: unlike(case, other, self.text)
        )

    def _logits(self, stream: Stream) -> Any:
        """Of a prefill and the decode steps after it."""
        steps = SETTINGS.decode_steps
        prompts = [row[: len(row) - steps] for row in self.rows]
        logits = [stream.prefill(prompts)]
        for step in range(steps):
            logits.append(stream.decode([int(row[len(row) - steps + step]) for row in self.rows]))
        return np.concatenate(logits).astype(np.float64)

    def _kl(self, a: Any, b: Any) -> float:
        p, q = log_softmax(a), log_softmax(b)
        return float(np.sum(np.exp(p) * (p - q), axis=-1).mean())


def table(out: Path, model: Any, names: list[str], folder: Path) -> tuple[str, list[str]]:
    """The table as Markdown, and a line for each mutation that passes with too large an effect."""
    tables = {name: Table(out, model, name, folder / name) for name in names}
    cells: dict[str, dict[str, list[Found]]] = {}
    for name, made_table in tables.items():
        for found in made_table.found():
            cells.setdefault(found.what, {}).setdefault(name, []).append(found)
        print(name, "done", file=sys.stderr)
    lines = [f"| mutation | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines.append(f"| own noise | {' | '.join(f'{tables[n].noise:.1e}' for n in names)} |")
    bad = []
    for what, row in cells.items():
        shown = []
        for name in names:
            several = row[name]
            by = "C V" if all(f.confirm for f in several) else "V"
            passed = [f for f in several if not f.verify]
            least, most = min(f.kl for f in several), max(f.kl for f in several)
            shown.append(f"{least:.1e} to {most:.1e} {by if not passed else f'**{len(passed)} PASS**'}")
            bad += [f"{what} in {name}: {f.kl:.1e}" for f in passed if f.kl > 2 * tables[name].noise]
        lines.append(f"| {what} | {' | '.join(shown)} |")
    return "\n".join(lines), bad


def main(names: list[str]) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = build_stories(DATA / "models" / "stories260K", root / "model")
        out = root / "out"
        api.run(
            folder,
            out,
            api.SelectSettings(k=2, criterion="cca"),
            api.CalibrateSettings(
                (str(DATA / "text" / "tinystories_exllamav2.jsonl.gz"),), 32, 128, heldout_samples=8
            ),
            replace(SETTINGS, contexts=(16,), rounds=3),
        )
        found, bad = table(out, load(folder), names or list(COLUMNS), root / "graphs")
    if names:
        print(found)
    else:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(BEGIN)[0], page.split(END)[1]
        machine = f"Measured on the CPU of a {platform.machine()} machine."
        PAGE.write_text(f"{before}{BEGIN}\n\n{found}\n\n{machine}\n\n{END}{after}", encoding="utf-8")
    print(*bad, sep="\n", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
