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

from nbl_export.settings.choices import SELF

C4, WIKIPEDIA, WIKITEXT = "C4", "Wikipedia", "WikiText-2"
# What each run is calibrated on, and what it is judged on; a model's own text is judged on all.
FILES = {
    "c4_demo_300": (C4, "c4_demo_300.jsonl.gz"),
    "c4_exllamav2_118": (C4, "c4_exllamav2_118.jsonl.gz"),
    "wikipedia_exllamav2_2349": (WIKIPEDIA, "wikipedia_exllamav2_2349.jsonl.gz"),
    "wikitext2": (WIKITEXT, "wikitext2-raw.valid.txt.gz"),
    SELF: (None, SELF),
}
WAYS = ("cca, lmmse", "greedy by the text alone", "greedy, lmmse")


def judges(name: str) -> dict[str, str]:
    """Of each kind of text a file that the run ``name`` does not calibrate on."""
    found: dict[str, str] = {}
    for other, (kind, file) in FILES.items():
        if kind is not None and other != name:
            found.setdefault(kind, file)
    return found


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
    texts = [C4, WIKIPEDIA, WIKITEXT]
    rows = list(dict.fromkeys(judge for cell in found.values() for judge in cell if judge not in texts))
    lines = [["way", "K", *(f"{judge} mean, worst" for judge in texts), *rows]]
    lines.append(["---"] * len(lines[0]))
    for (way, k), cell in sorted(found.items(), key=lambda at: (WAYS.index(at[0][0]), int(at[0][1]))):
        means = [f"{sum(cell[t]) / len(cell[t]):.3f}, {max(cell[t]):.3f}" for t in texts]
        lines.append([way, k, *means, *(f"{max(cell[row]):.3f}" for row in rows)])
    written = "\n".join("| " + " | ".join(line) + " |" for line in lines)
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
    for name, (kind, file) in FILES.items():
        out = arguments.out / name
        command = [sys.executable, bench, arguments.model, file if kind is None else arguments.texts / file]
        for judge, text in judges(name).items():
            command += ["--judge", f"{judge}={arguments.texts / text}"]
        command += ["--context", "--samples", "128", "--selection-samples", "8", "--tokens", arguments.tokens]
        subprocess.run([*command, "--k", *arguments.k, "--ways", *WAYS, "--out", out], check=True)
        runs[name] = json.loads((out / "quality.json").read_text())
    written = table(runs)
    (arguments.out / "texts.md").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()
