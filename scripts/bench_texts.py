"""How much the choice depends on the text: layers chosen on five texts, each judged on the others.

    python scripts/bench_texts.py MODEL TEXTS [--out DIR] [--k 4 8 12 16] [--tokens 8192]

TEXTS is the folder of shared/data/README.md. Each of the five, of which no two share a document, is calibrated on with
the defaults of `nbl-export`, and `scripts/bench_quality.py` selects by greedy search, by greedy search that looks at
the text alone, and by the paper's ranking. The table has the mean and the worst excess (ln of the perplexity ratio)
over the five. Of the synthetic rows, which are of other seeds than those that selection has, only the worst: a
number below 0 is a gain. DIR/TEXT keeps each run, and what is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench_quality import PAPER, markdown

from nbl_export.api import CalibrateSettings
from nbl_export.settings.choices import SELF

# The text of each file. What a model writes itself is the fifth that is calibrated on.
FILES = {
    "c4_demo_300.jsonl.gz": "C4",
    "c4_exllamav2_118.jsonl.gz": "C4",
    "wikipedia_exllamav2_2349.jsonl.gz": "Wikipedia",
    "wikitext2-raw.valid.txt.gz": "WikiText-2",
}
TEXTS = list(dict.fromkeys(FILES.values()))
# Ways of bench_quality, and what they are called in the table.
WAYS = {
    PAPER: "the paper's (`cca`)",
    "greedy by the text alone": "text alone",
    "greedy, lmmse": "**default**",
}


def judges(calibrated: str) -> dict[str, str]:
    """Of each kind of text the first file that is not ``calibrated`` on."""
    return {text: file for file, text in reversed(FILES.items()) if file != calibrated}


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Mean and worst over the ``runs`` as Markdown, and the layers of each."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    layers = []
    for name, results in runs.items():
        for key, cell in results.items():
            way, k = key.split("|")
            layers.append(f"{name}, {way}, K = {k}: {' '.join(map(str, cell['layers']))}")
            for judge, loss in cell["losses"].items():
                found[way, k][judge].append(loss["excess"])
    kinds = list(dict.fromkeys(judge for cell in found.values() for judge in cell if judge not in TEXTS))
    lines = []
    for (way, k), cell in sorted(found.items(), key=lambda at: (list(WAYS).index(at[0][0]), int(at[0][1]))):
        means = [f"{sum(cell[t]) / len(cell[t]):.3f}, {max(cell[t]):.3f}" for t in TEXTS]
        lines.append([WAYS[way], k, *means, *(f"{max(cell[kind]):.3f}" for kind in kinds)])
    written = markdown(["way", "K", *(f"{text} mean, worst" for text in TEXTS), *kinds], lines)
    return f"{written}\n\n" + "\n".join(layers) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--out", type=Path, default=Path("out/bench-texts"))
    parser.add_argument("--k", nargs="+", default=["4", "8", "12", "16"])
    parser.add_argument("--tokens", default="8192", help="held-out tokens of each text")
    arguments = parser.parse_args()
    bench, runs = Path(__file__).with_name("bench_quality.py"), {}
    own = CalibrateSettings()
    rows = ["--samples", str(own.samples), "--selection-samples", str(own.selection_samples)]
    for calibrated in (*FILES, SELF):
        name = calibrated.partition(".")[0]
        out = arguments.out / name
        source = calibrated if calibrated == SELF else arguments.texts / calibrated
        command = [sys.executable, bench, arguments.model, source, *rows]
        for text, file in judges(calibrated).items():
            command += ["--judge", f"{text}={arguments.texts / file}"]
        command += ["--context", "--tokens", arguments.tokens]
        subprocess.run([*command, "--k", *arguments.k, "--ways", *WAYS, "--out", out], check=True)
        runs[name] = json.loads((out / "quality.json").read_text())
    written = table(runs)
    (arguments.out / "texts.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
