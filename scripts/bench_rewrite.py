"""Rewrite an 8B-shaped decoder at K = 12: time, bytes written and peak memory, compared with a copy of its data.

    scripts/bench_rewrite.py FOLDER [--layers 32] [--k 12] [--split 6] [--keep]

FOLDER needs 50 GB. The decoder has the shape of Llama 3.1 8B and the operators of onnxruntime-genai's
builder, in fp16 with random weights (scripts/synthetic_llama.py). There is no PyTorch model of it, so the plan's
activations are taken from the graph itself: the proof runs as on a real model but proves nothing. Each rewrite is a
separate process, as on the command line. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from synthetic_llama import write_synthetic_llama

from nbl_export.graph.io import load_graph
from nbl_export.graph.regions import AttentionRegion, find_regions
from nbl_export.linearize.plan import LinearLayer, Plan, save_plan
from nbl_export.runtime.intermediates import compute_tensors, prefill_rows

GB = 10**9
# The command line, and then the peak of its resident memory as recorded by Linux.
_RUN = (
    "import re, sys\n"
    "from nbl_export.cli import main\n"
    "try:\n    main()\n"
    "finally:\n"
    "    status = open('/proc/self/status').read()\n"
    "    print('peak kB', re.search(r'VmHWM:\\s+(\\d+)', status)[1], file=sys.stderr)\n"
)


@dataclass(frozen=True)
class Run:
    """One measured command: seconds, peak resident memory and bytes of written files."""

    name: str
    seconds: float
    peak: int | None
    written: int


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument(
        "--split", type=float, default=6.0, metavar="GB", help="largest data file, in 10⁹ bytes"
    )
    parser.add_argument("--keep", action="store_true", help="leave the model and the results there")
    given = parser.parse_args()
    source, plan = given.folder / "model", given.folder / "plan.json"
    if not (source / "model.onnx").exists():
        wide = given.hidden * 7 // 2
        heads = max(4, given.hidden // 128)
        write_synthetic_llama(
            source,
            hidden=given.hidden,
            layers=given.layers,
            heads=heads,
            kv_heads=heads // 4,
            intermediate=wide,
            split_bytes=int(given.split * GB),
        )
    write_plan(source / "model.onnx", plan, given.layers, given.k)
    runs = [
        copied(source, given.folder / "copy"),
        rewritten("into a new folder", source, plan, given.folder / "out"),
    ]
    print(
        f"{given.layers} layers, width {given.hidden}, K = {given.k}, {size_of(source) / GB:.2f} GB of fp16\n"
    )
    print("| | seconds | written, GB | GB/s | peak memory, MiB |\n| --- | --- | --- | --- | --- |")
    for run in runs:
        peak = f"{run.peak / 2**20:,.0f}" if run.peak else ""
        speed = f"{run.written / GB / run.seconds:.2f}"
        print(f"| {run.name} | {run.seconds:.1f} | {run.written / GB:.2f} | {speed} | {peak} |")
    if not given.keep:
        shutil.rmtree(given.folder)


def write_plan(graph: Path, path: Path, layers: int, k: int) -> None:
    """A plan of ``k`` random linear layers, with the graph's own activations as the probe."""
    model = load_graph(graph)
    regions = [r for r in find_regions(model) if isinstance(r, AttentionRegion)]
    names = [str(v.name) for r in regions for v in (r.x, r.y)]
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 1000, length) for length in (24, 16)]
    found = compute_tensors(model, names, prefill_rows(model, rows))
    taps = {name: np.concatenate([row[name][0] for row in found]) for name in names}
    width = taps[names[0]].shape[-1]
    mask = np.ones((2, 24), dtype=np.int64)
    mask[1, :8] = 0
    ids = np.zeros((2, 24), dtype=np.int64)
    ids[0], ids[1, 8:] = rows
    chosen = sorted(int(i) for i in generator.choice(layers, k, replace=False))
    scale = np.float32(width**-0.5)

    def linear() -> LinearLayer:
        return LinearLayer(
            generator.standard_normal((width, width), dtype=np.float32) * scale,
            generator.standard_normal((width,), dtype=np.float32),
        )

    plan = Plan(
        model="synthetic",
        hidden_size=width,
        layer_count=layers,
        fit_input="normed",
        criterion="random",
        ridge=0.0,
        calibration_tokens=0,
        layers={i: linear() for i in chosen},
        probe={"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)},
        probe_u={r.layer: taps[str(r.x.name)] for r in regions},
        probe_y={r.layer: taps[str(r.y.name)] for r in regions},
    )
    save_plan(path, plan)


def copied(source: Path, target: Path) -> Run:
    """The speed of the disk: the same files copied by ``cp``."""
    start = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - start
    written = size_of(target)
    shutil.rmtree(target)
    return Run("cp of the model, for comparison", seconds, None, written)


def rewritten(name: str, source: Path, plan: Path, out: Path) -> Run:
    command = [
        sys.executable,
        "-c",
        _RUN,
        "rewrite",
        "--onnx",
        str(source),
        "--plan",
        str(plan),
        "--output",
        str(out),
    ]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    peak = int(done.stderr.rsplit("peak kB", 1)[1].split()[0]) * 1024
    return Run(f"rewrite {name}", seconds, peak, size_of(out))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


if __name__ == "__main__":
    main()
