"""Speed of the linearized graph compared with its alternatives, on one machine in one run.

    python scripts/bench_speed.py MODEL CALIBRATION [--k 8 12] [--out DIR]

Calibrates once, chooses K layers for each --k, and rewrites by the same plans the graphs of this package's exporter in
fp32, with a growing and a shared cache, and of onnxruntime-genai's builder in fp32 and int4. Then `nbl-export bench`
times in every cell, interleaved: base and linearized graph, the same layers dropped, PyTorch (eager and compiled), the
shared and the genai pairs, optimum's graph (if NBL_EXPORT_OPTIMUM_PYTHON is set), and the graph with the other K. At
the contexts of --long there is not enough memory for all of them: there only the four pairs of graphs are timed, in a
separate run. All results are saved in DIR: the tables are DIR/speed.md and DIR/speed-long.md, next to the plots (.png)
and all figures (.json). The last K's report has those of the first run too.

On a machine with an NVIDIA GPU the same is then run on the GPU, with TensorRT engines and the CUDA provider; otherwise
the reason for skipping it is printed.
"""

from __future__ import annotations

import argparse
import os
import shutil
from dataclasses import replace
from pathlib import Path

from nbl_export import api
from nbl_export.cli.output import TerminalListener
from nbl_export.engine.library import find_gpu
from nbl_export.export.others import VARIABLE

FORMS = {
    "torch": api.ExportSettings(),
    "shared": api.ExportSettings(kv_cache="shared"),
    "genai fp32": api.ExportSettings(exporter="genai"),
    "genai int4": api.ExportSettings("int4", exporter="genai"),
}
PEERS = ("dropped", "eager", "compile")


def prepared(arguments: argparse.Namespace, k: int) -> dict[str, Path]:
    """Rewritten output folders of every form with K layers; existing ones are reused."""
    start = arguments.out / "calibrated"
    text = api.CalibrateSettings(tuple(arguments.calibration), arguments.samples, 512, 1, 16)
    api.calibrate(arguments.model, start, text, TerminalListener())
    folders: dict[str, Path] = {}
    for name, form in FORMS.items():
        folder = arguments.out / (f"k{k}" if name == "torch" else f"k{k}-{name.replace(' ', '-')}")
        if not folder.exists():
            shutil.copytree(folders.get("torch", start), folder, ignore=_only_plan)
        if name == "torch":
            api.select(folder, api.SelectSettings(k=k, criterion=arguments.criterion), TerminalListener())
        api.export(folder, form, TerminalListener())
        api.rewrite(folder, TerminalListener())
        folders[name] = folder
    return folders


def _only_plan(folder: str, names: list[str]) -> set[str]:
    """The entries of a finished folder not to copy for another exporter: everything but the folder nbl."""
    path = Path(folder)
    return set(names) - {"nbl"} if (path / "nbl").exists() else set()


def optimum(arguments: argparse.Namespace) -> Path | None:
    """The folder with optimum's export, None if optimum is not installed."""
    if not os.environ.get(VARIABLE):
        print(f"optimum is left out: {VARIABLE} names no Python that has it.")
        return None
    folder: Path = arguments.out / "optimum"
    if not folder.exists():
        shutil.copytree(arguments.out / "calibrated", folder)
    return api.export(folder, api.ExportSettings(exporter="optimum"), TerminalListener()).parent


def raced(out: Path, folder: Path, settings: api.BenchSettings, name: str) -> None:
    """One bench; its table, plot and figures are kept in ``out`` as ``name``."""
    api.bench(folder, settings, TerminalListener())
    report = folder / "report"
    for found in (report / "bench.md", report / "bench.json", report / "plots" / "bench.png"):
        shutil.copyfile(found, out / f"{name}{found.suffix}")
    print((out / f"{name}.md").read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration", nargs="+")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 12])
    parser.add_argument("--criterion", default="greedy")
    parser.add_argument("--samples", type=int, default=256, help="calibration rows of 512 tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--long", type=int, nargs="*", default=[4096, 8192], help="contexts for graphs alone")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--out", type=Path, default=Path("out/bench-speed"))
    arguments = parser.parse_args()
    made = {k: prepared(arguments, k) for k in arguments.k}
    most = max(arguments.k)
    folder = made[most]["torch"]
    pairs = [f"{name}={path}" for name, path in made[most].items() if name != "torch"]
    others = [f"K = {k}={made[k]['torch']}" for k in arguments.k if k != most]
    if exported := optimum(arguments):
        others.append(f"optimum={exported}")
    for device in ("cpu", "cuda"):
        if device == "cuda" and find_gpu() is None:
            print("The CUDA provider and TensorRT engines are left out: there is no NVIDIA GPU.")
            continue
        if device == "cuda":
            api.build(folder, listener=TerminalListener())
        name = "speed" if device == "cpu" else "speed-gpu"
        common = api.BenchSettings(
            tuple(pairs),
            contexts=tuple(arguments.long),
            batches=(1,),
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            device=device,
        )
        if arguments.long:
            raced(arguments.out, folder, common, f"{name}-long")
        everybody = replace(
            common,
            against=(*pairs, *others),
            peer=tuple(arguments.peers),
            batches=tuple(arguments.batches),
            contexts=tuple(arguments.contexts),
        )
        raced(arguments.out, folder, everybody, name)


if __name__ == "__main__":
    main()
