"""A bench as one JSON value with a versioned schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nbl_export.report.header import Header, load_judged
from nbl_export.report.legacy_speed import bench_section
from nbl_export.verify.speed.values import Speed

REMEDY = "run `nbl-export bench` again"


@dataclass(frozen=True)
class BenchReport(Header):
    """Everything that ``nbl-export bench`` measured, and the verdicts on it."""

    SCHEMA: ClassVar[str] = "nbl-export/bench/2"

    settings: Mapping[str, Any]
    speed: Speed


def load_bench(path: Path) -> BenchReport:
    """Read ``bench.json``, also of the schema before; raises :class:`InputError` for anything else."""
    return load_judged(BenchReport, path, "bench", REMEDY, older={"nbl-export/bench/1": bench_section})
