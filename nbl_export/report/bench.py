"""A bench as one JSON value with a versioned schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.checks import Check
from nbl_export.errors import InputError
from nbl_export.files import read_json
from nbl_export.records import from_json, to_json
from nbl_export.report.legacy_speed import bench_section
from nbl_export.verify.speed.values import Speed

SCHEMA, OLD_SCHEMA = "nbl-export/bench/2", "nbl-export/bench/1"
REMEDY = "run `nbl-export bench` again"


@dataclass(frozen=True)
class BenchReport:
    """Everything that ``nbl-export bench`` measured, and the verdicts on it."""

    created: str
    tool_version: str
    model: Mapping[str, Any]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    hashes: Mapping[str, str]
    speed: Speed
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return all(c.status != "failed" for c in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "verdict": "passed" if self.passed else "failed", **to_json(self)}


def load_bench(path: Path) -> BenchReport:
    """Read ``bench.json``, also of the schema before; raises :class:`InputError` for anything else."""
    raw = read_json(path, "The bench", REMEDY)
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema not in (SCHEMA, OLD_SCHEMA):
        raise InputError(f"{path} is no bench of this version ({SCHEMA}): {REMEDY}.")
    body = {k: v for k, v in raw.items() if k not in ("schema", "verdict")}
    return bench_of(bench_section(body) if schema == OLD_SCHEMA else body, str(path))


def bench_of(raw: Mapping[str, Any], what: str = "The bench of the report") -> BenchReport:
    """A bench as it stands in a report; raises :class:`InputError`, which calls it ``what``."""
    return from_json(BenchReport, raw, what, REMEDY)
