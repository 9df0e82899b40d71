"""The report: every figure of a run in one JSON value with a versioned schema.

``report.json`` is the source; every other file of the report and the terminal's summary are drawn from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from nbl_export.checks import Check, load_judged
from nbl_export.files import jsonable
from nbl_export.records import from_json
from nbl_export.report.bench import BenchReport, bench_of
from nbl_export.report.legacy_speed import bench_section, engine_speed_section, speed_section
from nbl_export.verify.speed.values import Speed

SCHEMA = "nbl-export/report/1"


@dataclass(frozen=True)
class Report:
    """A finished report. Sections that were not run are None; a check says why.

    ``graph`` holds the graph before and after, the proof of each layer, its precision, the form of its
    cache and the nodes that stay float32; ``engines`` the manifests of the engines that were built;
    ``bench`` what `nbl-export bench` measured on the same graphs; ``selection`` the scores of all layers;
    ``hashes`` the SHA-256 of model, plan and graphs.
    """

    created: str
    tool_version: str
    model: Mapping[str, Any]
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    hashes: Mapping[str, str]
    stage_seconds: Mapping[str, float]
    selection: Mapping[str, Any]
    graph: Mapping[str, Any]
    parity: Mapping[str, Any] | None
    divergence: str | None
    method_loss: Mapping[str, Any] | None
    speed: Speed | None
    checks: Sequence[Check]
    notes: Sequence[str]
    engines: Sequence[Mapping[str, Any]] | None = None
    engine_parity: Mapping[str, Any] | None = None
    engine_speed: Speed | None = None
    bench: BenchReport | None = None

    @property
    def passed(self) -> bool:
        """No check failed, and at least one that decides was run and passed."""
        states = [c.status for c in self.checks]
        return "failed" not in states and "passed" in states

    def as_json(self) -> dict[str, Any]:
        body = jsonable(asdict(self))
        return {"schema": SCHEMA, "verdict": "passed" if self.passed else "failed", **body}


def load_report(path: Path) -> Report:
    """Read ``report.json``; raises :class:`InputError` for anything else."""
    remedy = "run `nbl-export verify` again"
    value = load_judged(Report, path, "report", SCHEMA, remedy)

    def speed(raw: Any) -> Speed:
        return from_json(Speed, raw, str(path), remedy)

    # As they were read they are JSON.
    return replace(
        value,
        speed=speed(speed_section(raw)) if (raw := cast(Any, value.speed)) else None,
        engine_speed=speed(engine_speed_section(raw)) if (raw := cast(Any, value.engine_speed)) else None,
        bench=bench_of(bench_section(raw)) if (raw := cast(Any, value.bench)) else None,
    )
