"""Build base and linearized engines in every precision with both caches: sizes, layer counts, build times.

    scripts/bench_engines.py MODEL OUT --k 12 [--calibration TEXT]

Prints a Markdown table (docs/engines.md has one) and the parity of each graph in ONNX Runtime against float32 PyTorch.
Needs no GPU: tensorrt-rtx builds ahead of time. OUT is calibrated once, and exported, rewritten and built for each row.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nbl_export import api
from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.cli.terminal import TerminalListener
from nbl_export.engine.pair import EngineFile
from nbl_export.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--calibration", nargs="+", default=["self"])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--precision", nargs="+", default=["fp16", "bf16", "fp32"])
    parser.add_argument("--kv-cache", nargs="+", default=["static", "concat"])
    given = parser.parse_args()
    listener = TerminalListener()
    text = api.CalibrateSettings(tuple(given.calibration), samples=given.samples)
    api.calibrate(given.model, given.out, text, listener)
    api.select(given.out, api.SelectSettings(k=given.k), listener)
    print(
        _line(
            "",
            "attention",
            "base, MiB",
            "linearized, MiB",
            "build, s",
            "export + rewrite + build, s",
            "largest logit difference",
        )
    )
    print(_line(*["---"] * 7))
    for precision in given.precision:
        for cache in given.kv_cache:
            api.export(given.out, api.ExportSettings(precision, cache), listener)
            api.rewrite(given.out, listener)
            engines = {e.manifest.role: e for e in api.build(given.out, api.EngineSettings("rtx"), listener)}
            report = api.verify(given.out, api.VerifySettings(quality=False, speed=False), listener)
            print(_row(precision, cache, engines, report.parity, given.out), flush=True)


def _row(precision: str, cache: str, engines: dict[str, EngineFile], parity: Any, out: Path) -> str:
    base, linear = engines[BASE].manifest, engines[LINEARIZED].manifest
    counts = f"{base.network.attention} → {linear.network.attention} {linear.attention}"
    worst = parity.worst
    records = [Workspace.open(out).record(stage) for stage in ("export", "rewrite", "build")]
    return _line(
        f"{precision}, {cache}",
        counts,
        f"{base.size / 2**20:.1f}",
        f"{linear.size / 2**20:.1f}",
        f"{base.build_seconds:.0f} + {linear.build_seconds:.0f}",
        f"{sum(r.seconds for r in records if r):.0f}",
        f"{worst:.1e}",
    )


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
