"""Method loss by criterion, fit and K: the loss of each way to choose and fit layers on held-out text.

    python scripts/bench_quality.py MODEL CALIBRATION --judge NAME=TEXT … [--out DIR]

Calibrates once on CALIBRATION. Then for each way and K it selects like `nbl-export select` and measures on every
--judge text (its first --tokens tokens, packed in rows of 512)

excess    ln(perplexity linearized / perplexity original), ± its standard error over documents
÷ paper   that excess divided by that of the paper's method (CCA ranking, plain LMMSE) with the same K and text
KL        of the next token, original to linearized, in nats

The --judge texts are used for evaluation only: layers are chosen on a split of CALIBRATION. Seconds are those of the
selection, including repair; measurements of earlier cells are reused. Results are saved in DIR/quality.json and
reused, so --ways and --k can be extended; the table is DIR/quality.md. Models are run in bfloat16 if the processor
supports it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export import api
from nbl_export.calibrate.documents import documents
from nbl_export.calibrate.synthetic import SyntheticRow, synthetic_rows
from nbl_export.calibrate.text import end_token, load_text
from nbl_export.linearize.loss import LossMeter, loss_of_plan
from nbl_export.models.load import LoadedModel, load_tokenizer
from nbl_export.models.source import find_model
from nbl_export.models.weights import dtype_of, resident, room
from nbl_export.progress import Silent
from nbl_export.report.schema import environment
from nbl_export.workspace import Workspace

SEQ_LEN = 512
PAPER = "cca, lmmse"
WAYS: Mapping[str, Mapping[str, Any]] = {
    PAPER: {"criterion": "cca"},
    "nmse, lmmse": {"criterion": "nmse"},
    "linearity, lmmse": {"criterion": "linearity"},
    "kl, lmmse": {"criterion": "kl"},
    "greedy, lmmse": {"criterion": "greedy"},
    "greedy by the text alone": {"criterion": "greedy", "synthetic": False},
    "greedy, weighted": {"criterion": "greedy", "fit": "weighted"},
    "greedy, sequential": {"criterion": "greedy", "fit": "sequential"},
    "greedy, lmmse, ridge by held-out error": {"criterion": "greedy", "ridge": None},
    **{f"greedy, lmmse, rank {r}": {"criterion": "greedy", "rank": r} for r in (192, 128, 64)},
    "drop, drop": {"criterion": "drop", "fit": "drop"},
    "greedy, lmmse, repaired": {"criterion": "greedy", "repair": 400},
}


def packed(tokenizer: Any, text: str, tokens: int) -> tuple[Any, Any]:
    """The first ``tokens`` of a text in rows, and the document number of each token."""
    ids: list[int] = []
    owners: list[int] = []
    for number, document in enumerate(t for t in documents((text,), "text") if t.strip()):
        own = [
            *tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"],
            end_token(tokenizer),
        ]
        ids += own
        owners += [number] * len(own)
        if len(ids) >= tokens:
            break
    length = min(len(ids), tokens) // SEQ_LEN * SEQ_LEN
    return tuple(np.array(a[:length], dtype=np.int32).reshape(-1, SEQ_LEN) for a in (ids, owners))  # type: ignore[return-value]


def in_context(out: Path, tokenizer: Any) -> Mapping[str, tuple[Any, Any]]:
    """Of each kind of synthetic rows some that no selection has seen, and what is counted of them."""
    text, found = load_text(Workspace.open(out).text), dict[str, list[SyntheticRow]]()
    for seed in range(1000, 1004):
        for row in synthetic_rows(text, tokenizer, seed):
            found.setdefault(row.kind, []).append(row)
    return {
        kind: (
            np.stack([row.tokens for row in rows]),
            np.stack([np.insert(np.where(row.owner < 0, -1, n), 0, -1) for n, row in enumerate(rows)]),
        )
        for kind, rows in found.items()
    }


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows))


def table(results: Mapping[str, Any], judges: list[str]) -> str:
    """The results as Markdown."""
    columns = ["way", "K", *(f"{j} {c}" for j in judges for c in ("excess", "÷ paper", "KL"))]
    columns += ["seconds", "layers"]
    lines = []
    for way, k in sorted(
        (key.split("|") for key in results), key=lambda at: (list(WAYS).index(at[0]), int(at[1]))
    ):
        cell = results[f"{way}|{k}"]
        line = [way, k]
        for judge in judges:
            loss = cell["losses"][judge]
            paper = results.get(f"{PAPER}|{k}", {}).get("losses", {}).get(judge)
            line += [
                f"{loss['excess']:.4f} ± {loss['excess_se']:.4f}",
                f"{loss['excess'] / paper['excess']:.2f}" if paper else "–",
                f"{loss['kl']:.4f} ± {loss['kl_se']:.4f}",
            ]
        line += [f"{cell['seconds']:.0f}", " ".join(map(str, cell["layers"]))]
        lines.append(line)
    return markdown(columns, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration", nargs="+")
    parser.add_argument("--judge", action="append", required=True, metavar="NAME=TEXT")
    parser.add_argument("--tokens", type=int, default=12288, help="held-out tokens of each text")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 8, 12, 16])
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--samples", type=int, default=256, help="calibration rows of 512 tokens, at most")
    parser.add_argument("--selection-samples", type=int, default=16)
    parser.add_argument(
        "--heldout-samples", type=int, default=1, help="rows that the folder keeps for verify"
    )
    parser.add_argument(
        "--context", action="store_true", help="judge by synthetic rows, too: copies, formats, look-ups"
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench-quality"))
    arguments = parser.parse_args()
    text = api.CalibrateSettings(
        tuple(arguments.calibration),
        arguments.samples,
        SEQ_LEN,
        arguments.heldout_samples,
        arguments.selection_samples,
    )
    api.calibrate(arguments.model, arguments.out, text)
    path = arguments.out / "quality.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    source = find_model(arguments.model)
    tokenizer = load_tokenizer(source)
    model = LoadedModel(source, Silent()).in_dtype("auto")
    judges = dict(j.split("=", 1) for j in arguments.judge)
    with resident(model, room(model)):  # or each pass reads the weights
        meters = {
            name: LossMeter(model, *packed(tokenizer, text, arguments.tokens), "normed")
            for name, text in judges.items()
        }
        if arguments.context:
            rows = in_context(arguments.out, tokenizer)
            meters |= {kind: LossMeter(model, *judged, "normed") for kind, judged in rows.items()}
        for way, k in itertools.product(arguments.ways or WAYS, arguments.k):
            if f"{way}|{k}" in results:
                continue
            start = time.perf_counter()
            plan = api.select(arguments.out, api.SelectSettings(k=k, **WAYS[way]))
            results[f"{way}|{k}"] = {
                "seconds": time.perf_counter() - start,
                "layers": list(plan.chosen),
                "losses": {name: loss_of_plan(meter, plan).as_json() for name, meter in meters.items()},
            }
            path.write_text(json.dumps(results, indent=1))
            print(f"{way}, K = {k}: {results[f'{way}|{k}']}", flush=True)
    machine = environment()
    written = (
        f"{table(results, list(meters))}\n\n{Path(arguments.model).name}, calibrated on "
        f"{', '.join(Path(t).name for t in arguments.calibration)}, {arguments.samples} rows at most; "
        f"{arguments.tokens} tokens of each text; {dtype_of(model)}. {machine.processor}, {machine.cores} cores, "
        f"{machine.memory_gib} GiB; torch {machine.packages['torch']}.\n"
    )
    (arguments.out / "quality.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
