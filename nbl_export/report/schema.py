"""Hold a report: every figure of a run, a bench or a conversion in one JSON value with a versioned schema.

``report.json`` is the source; every other file of the report and the terminal's summary are drawn from it. A section is
the value that the room which measures it makes; :mod:`nbl_export.records` writes and reads them.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from nbl_export.blocks import Block
from nbl_export.engine.manifest import Manifest
from nbl_export.errors import InputError
from nbl_export.files import read_json
from nbl_export.graph.summary import Float32Node, OnCopy, RewriteSummary
from nbl_export.linearize.selection import Scores
from nbl_export.machine import cores
from nbl_export.models.source import ModelIdentity
from nbl_export.records import Check, from_json, to_json
from nbl_export.verify.parity.figures import (
    DecoderParity,
    EncoderParity,
    EngineParity,
    Likeness,
    MethodLoss,
    Parity,
)
from nbl_export.verify.speed.values import Speed

_PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "lm-eval",
    "datasets",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
    "scipy",
    "pillow",
)


# what every report begins with -------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """Python, operating system, processor, memory and package versions; nothing that names the machine."""

    python: str
    system: str
    processor: str
    cores: int | None
    memory_gib: float
    packages: Mapping[str, str]


def environment() -> Environment:
    """This machine, with the cores that this process may use."""
    import psutil

    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processor=processor(),
        cores=cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        packages={name: d.version for name in _PACKAGES for d in [*distributions(name=name)][:1]},
    )


def processor() -> str:
    """The processor as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


@dataclass(frozen=True)
class Header:
    """What every report begins with: of which model, on what machine, as asked for how, and with which verdicts.

    ``hashes`` are SHA-256 by name. A report without a check that passed has not passed.
    """

    SCHEMA: ClassVar[str]
    VERDICTS: ClassVar[tuple[str, ...]] = ("passed", "failed")

    created: str
    tool_version: str
    model: ModelIdentity
    environment: Environment
    settings: object
    hashes: Mapping[str, str]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """No check failed, and at least one that decides was run and passed."""
        states = [c.status for c in self.checks]
        return "failed" not in states and "passed" in states

    @property
    def verdict(self) -> str:
        """One of ``VERDICTS``."""
        return "passed" if self.passed else "failed"

    def as_json(self) -> dict[str, Any]:
        """The object that its file has."""
        return {"schema": self.SCHEMA, "verdict": self.verdict, **to_json(self)}


H = TypeVar("H", bound=Header)


def load_judged(kind: type[H], path: Path, what: str, remedy: str) -> H:
    """Read a ``kind`` of report from JSON; :class:`InputError` calls it ``what`` and says the ``remedy``."""
    raw = read_json(path, f"The {what}", remedy)
    if not isinstance(raw, dict) or raw.get("schema") != kind.SCHEMA:
        raise InputError(f"{path} is no {what} of this version ({kind.SCHEMA}): {remedy}.")
    body = {k: v for k, v in raw.items() if k not in ("schema", "verdict")}
    return from_json(kind, body, str(path), remedy)


# a bench, and a conversion -----------------------------------------------------------------------


@dataclass(frozen=True)
class BenchReport(Header):
    """Everything that ``nbl-export bench`` measured, and the verdicts on it."""

    SCHEMA: ClassVar[str] = "nbl-export/bench/2"

    settings: Mapping[str, Any]
    speed: Speed


def load_bench(path: Path) -> BenchReport:
    """Read ``bench.json``; raises :class:`InputError` for anything else."""
    return load_judged(BenchReport, path, "bench", "run `nbl-export bench` again")


@dataclass(frozen=True)
class Conversion:
    """The form of another engine: its file or folder in the output folder, its bytes, the layers that are linear in it,
    and what that engine computes with it against PyTorch.
    """

    file: str
    bytes: int
    layers: tuple[str, ...]
    checks: tuple[Check, ...]
    parity: Parity | None = None

    @property
    def passed(self) -> bool:
        return not any(check.status == "failed" for check in self.checks)


# a run -------------------------------------------------------------------------------------------


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
    """Of a section that an earlier verification of the same graphs measured: when, where, as asked for how, and with
    which ``checks``."""

    created: str
    tool_version: str
    environment: Environment
    settings: Mapping[str, Any]
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True)
class Report(Header):
    """A finished report. Sections that were not run are None; a check says why.

    ``settings`` are what was asked of each stage, as recorded; ``engines`` the manifests of those that were built;
    ``bench`` is what `nbl-export bench` measured on the same graphs, and ``forms`` what `nbl-export convert` found of
    the same plan, by form and precision; ``kept`` are the sections, by name, that an earlier verification measured on
    them, and this one did not.
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
    """Read ``report.json``; raises :class:`InputError` for anything else."""
    return load_judged(Report, path, "report", "run `nbl-export verify` again")
