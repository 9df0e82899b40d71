"""The report: every figure of a run in one JSON value with a versioned schema.

``report.json`` is the source; every other file of the report and the terminal's summary are drawn from it. A section is
the value that the room which measures it makes; :mod:`nbl_export.records` writes and reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from nbl_export.blocks import Block
from nbl_export.engine.manifest import Manifest
from nbl_export.graph.summary import Float32Node, OnCopy
from nbl_export.linearize.selection import Scores
from nbl_export.models.source import ModelIdentity
from nbl_export.report.bench import BenchReport
from nbl_export.report.environment import Environment
from nbl_export.report.forms import Conversion
from nbl_export.report.header import Header, load_judged
from nbl_export.report.legacy import SCHEMA_1, from_version_1
from nbl_export.rewrite.summary import RewriteSummary
from nbl_export.verify.loss.figures import Likeness, MethodLoss
from nbl_export.verify.parity.figures import DecoderParity, EncoderParity, EngineParity
from nbl_export.verify.speed.values import Speed


@dataclass(frozen=True)
class Model(ModelIdentity):
    """The model, its width and its number of layers."""

    hidden_size: int = field(kw_only=True)
    layers: int = field(kw_only=True)


@dataclass(frozen=True)
class Selection(Scores):
    """How layers were chosen and fitted, which (``layers``, ascending), and everything known when they were.

    ``ridge`` None was chosen by held-out error; ``repair`` steps of distillation; ``rank`` of the maps, None for whole
    ones. Calibrated on ``calibration_tokens`` tokens of ``sources``, drawn by ``seed``.
    """

    criterion: str = field(kw_only=True)
    fit_input: str = field(kw_only=True)
    ridge: float | None = field(kw_only=True)
    calibration_tokens: int = field(kw_only=True)
    layers: tuple[Block, ...] = field(kw_only=True)
    sources: tuple[str, ...] = field(kw_only=True)
    seed: int = field(kw_only=True)
    fit: str = field(default="lmmse", kw_only=True)
    repair: int = field(default=0, kw_only=True)
    rank: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Graph(RewriteSummary):
    """The graph before and after, the proofs, and how it was exported.

    ``task`` is an encoder's, None for a decoder; ``opset`` None where the exporter chose it. ``copies`` are the lengths
    that were crossed, or were to be, on a copy of the model.
    """

    precision: str
    kv_cache: str
    opset: int | None = None
    task: str | None = None
    kept_float32: tuple[Float32Node, ...] = ()
    copies: tuple[OnCopy, ...] = ()


@dataclass(frozen=True)
class Kept:
    """Of a section that an earlier verification of the same graphs measured: when, where, and as asked for how."""

    created: str
    tool_version: str
    environment: Environment
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Report(Header):
    """A finished report. Sections that were not run are None; a check says why.

    ``settings`` are what was asked of each stage, as recorded; ``engines`` the manifests of those that were built;
    ``bench`` is what `nbl-export bench` measured on the same graphs, and ``forms`` what `nbl-export convert` found of
    the same plan, by form and precision; ``kept`` are the sections, by name, that an
    earlier verification measured on them, and this one did not.
    """

    SCHEMA: ClassVar[str] = "nbl-export/report/2"

    model: Model
    settings: Mapping[str, Mapping[str, Any]]
    stage_seconds: Mapping[str, float]
    selection: Selection
    graph: Graph
    parity: DecoderParity | EncoderParity | None
    divergence: str | None
    method_loss: MethodLoss | Likeness | None
    speed: Speed | None
    engines: tuple[Manifest, ...] | None = None
    engine_parity: EngineParity | None = None
    engine_speed: Speed | None = None
    bench: BenchReport | None = None
    kept: Mapping[str, Kept] = field(default_factory=dict)
    forms: Mapping[str, Conversion] = field(default_factory=dict)

    def asked(self, section: str) -> Mapping[str, Any]:
        """The settings of the verification that measured a ``section``."""
        kept = self.kept.get(section)
        return kept.settings if kept else self.settings.get("verify", {})


def load_report(path: Path) -> Report:
    """Read ``report.json``, also of version 1; raises :class:`InputError` for anything else."""
    return load_judged(
        Report, path, "report", "run `nbl-export verify` again", older={SCHEMA_1: from_version_1}
    )
