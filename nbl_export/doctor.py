"""Diagnose this machine and environment: what is there, what is missing and would bring what, and what is wrong.

Packages are tried in a child process: one may be there and broken, its native code may crash. The main job runs here if
nothing is ``lacking``: every package that is always needed is there, in range, and works, and one runtime has computed
a graph.
"""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nbl_export import __version__
from nbl_export.errors import NblError, first_line
from nbl_export.machine import cores
from nbl_export.packages import ALWAYS, NAME, PARTS, Part, missing, origin, part, pip_command
from nbl_export.processes import ChildError, Tell, in_child
from nbl_export.progress import Listener, Silent
from nbl_export.report.drawing import Table
from nbl_export.report.schema import processor

RUNTIME = "onnxruntime"
DRIVER = "the NVIDIA driver"
_SECONDS = 180.0  # of one trial: torch on a cold network disk takes a minute
_GRAPH = """<ir_version: 8, opset_import: ["" : 17]>
map (float[n, 2] u) => (float[n, 2] y) <float[2, 2] w = {1, 2, 3, 4}, float[2] b = {10, 20}>
{ wu = MatMul(u, w)  y = Add(wu, b) }"""


@dataclass(frozen=True)
class Found:
    """A package: its ``version`` if it is there, the ``error`` where it does not work, and what it is for.

    ``pip`` is the line that brings it; ``takes`` the range of versions, if it is in none; ``detail`` what the trial
    found out. ``extra`` is as in :class:`nbl_export.packages.Part`.
    """

    package: str
    version: str | None
    error: str
    use: str
    detail: str
    extra: str | None
    takes: str
    pip: str

    @property
    def works(self) -> bool:
        return self.version is not None and not self.error

    @property
    def wrong(self) -> str:
        """What is wrong with it, in a sentence; empty if nothing is, or if it is not there."""
        if self.version is None or not (self.error or self.takes):
            return ""
        how = f"trying it {self.error}" if self.error else f"{self.takes} is needed"
        again = pip_command("install --force-reinstall" if self.error else "install")
        what = shlex.quote(self.package + self.takes)
        return f"{self.package} {self.version} is installed, and {how}: {again} {what}."


@dataclass(frozen=True)
class Diagnosis:
    """The findings. ``lacking`` are sentences on what keeps the main job from running, ``problems`` on the rest."""

    version: str
    origin: str
    machine: Mapping[str, str]
    parts: tuple[Found, ...]
    lacking: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def runs_here(self) -> bool:
        return not self.lacking

    @property
    def tables(self) -> list[Table]:
        """The machine, then the packages."""
        rows = tuple(
            (
                one.package,
                one.version or "",
                "missing" if one.version is None else "works" if one.works else "broken",
                f"{one.use} ({one.detail})" if one.detail else one.use,
            )
            for one in self.parts
        )
        title = f"nbl-export {self.version} from {self.origin}"
        return [
            Table(title, ("", "this machine"), tuple(self.machine.items())),
            Table("Packages", ("package", "version", "state", "for"), rows),
        ]

    @property
    def offers(self) -> list[tuple[str, str]]:
        """What each missing package would bring, and the command for it; what the main job lacks is said apart."""
        missing = (one for one in self.parts if one.version is None and one.extra != ALWAYS)
        return [(f"{one.package}: {one.use}", one.pip) for one in missing]


def doctor(listener: Listener | None = None) -> Diagnosis:
    """What this machine and this environment have, what each missing package would bring, and what is wrong.

    Nothing is changed or downloaded. What the main job lacks is in the value (``lacking``, ``runs_here``), not raised.
    Raises :class:`MissingDependencyError` without packaging, which reads versions.
    """
    if find_spec("packaging") is None:
        raise missing("packaging", "doctor")
    there = {one.package: known for one in PARTS if (known := _version(one))}
    trials = try_all([one.module for one in PARTS if one.package in there], listener or Silent())
    ranges, parts = out_of_range(there), []
    for one in PARTS:
        error, facts = trials[one.module] if one.package in there else ("", {})
        detail, takes = ", ".join(facts.get("providers", ())), ranges.get(one.package, "")
        known = there.get(one.package)
        parts.append(Found(one.package, known, error, one.use, detail, one.extra, takes, one.pip))
    where, editable = origin()
    from_ = f"{where or 'a package index'}{' (editable)' * editable}"
    return Diagnosis(__version__, from_, this_machine(trials), tuple(parts), *judged(parts))


def judged(parts: Sequence[Found]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A sentence for each thing without which the main job does not run, and for each that leaves it alone."""
    runtimes = [one for one in parts if part(one.package).module == RUNTIME]
    always = [one for one in parts if one.extra == ALWAYS]
    lacking = [f"{one.package} is missing ({one.use}): {one.pip}." for one in always if one.version is None]
    lacking += [one.wrong for one in always if one.wrong]
    problems = [one.wrong for one in parts if one.wrong and one not in always]
    lines = [one.pip for one in runtimes]
    if not any(one.works for one in runtimes):
        nothing = f"No runtime is there for graphs: {' or, for CUDA, '.join(lines)}, never both."
        broken = [one.wrong for one in runtimes if one.error]
        lacking += broken[:1] or [nothing]
        problems = [sentence for sentence in problems if sentence not in broken]
    if all(one.version is not None for one in runtimes):
        names = [one.package for one in runtimes]
        problems.append(
            f"{' and '.join(names)} are both installed and share one module: {pip_command('uninstall')} "
            f"{' '.join(names)}, then {' or '.join(lines)}."
        )
    return tuple(lacking), tuple(problems)


def this_machine(trials: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """This machine by name, with what ``trials`` of the driver, torch and onnxruntime found out."""
    own, every = cores(), os.cpu_count() or 1
    found = {
        "Python": f"{platform.python_version()}, {sys.executable}",
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": f"{own} of {every}" if own < every else str(own),
    }
    with suppress(ImportError):  # that it is missing is said where the packages are
        import psutil

        memory = psutil.virtual_memory()
        found["memory"] = f"{_gib(memory.total)}, {_gib(memory.available)} free"
    for name, folder in (("disk here", str(Path.cwd())), ("temporary files", tempfile.gettempdir())):
        found[name] = f"{_gib(shutil.disk_usage(folder).free)} free in {folder}"
    facts = {name: trials[name][1] for name in ("torch", RUNTIME) if name in trials}
    if fast := facts.get("torch", {}).get("fast"):
        found["bf16 products"] = f"{'yes' if fast == 'bfloat16' else 'no'}: models run in {fast}"
    error, driver = trials[DRIVER]
    found |= {f"GPU {number}": gpu for number, gpu in enumerate(driver.get("gpus", ()))}
    none = {"GPU": error or driver.get("no_gpu")} | {f"GPU in {n}": f.get("no_gpu") for n, f in facts.items()}
    return found | {name: f"none: {why}" for name, why in none.items() if why}


def out_of_range(there: Mapping[str, str]) -> dict[str, str]:
    """The range that this package takes, as pip recorded it, of each package whose version is not in it.

    A pre-release counts by its number; what is no version is not judged.
    """
    from packaging.requirements import Requirement
    from packaging.version import InvalidVersion, Version

    found = {}
    with suppress(PackageNotFoundError):
        extras = ["", *(metadata(NAME).get_all("Provides-Extra") or [])]
        for need in map(Requirement, requires(NAME) or []):
            holds = not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in extras)
            with suppress(InvalidVersion, KeyError):
                if holds and not need.specifier.contains(Version(there[need.name]), prereleases=True):
                    found[need.name] = str(need.specifier)
    return found


def try_all(modules: Iterable[str], listener: Listener) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Of each module, and of the GPU driver under the name :data:`DRIVER`, why its trial failed, or its facts.

    Those that come after a crash go on in another process.
    """
    waiting = list(dict.fromkeys([DRIVER, *modules]))
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    with listener.task("Trying packages", len(waiting), "packages") as task:

        def heard(told: Any) -> None:
            found[waiting.pop(0)] = told
            task.advance(1)

        while waiting:
            try:
                in_child(_try, waiting, "Trying packages", "leave one out", _SECONDS, heard)
            except ChildError as error:
                heard((error.reason, {}))
            except (NblError, OSError) as error:
                heard((f"failed ({first_line(error)})", {}))
    return found


def _version(one: Part) -> str | None:
    """The version of a package that is there; "unknown" for a module that no record of an installer names."""
    with suppress(PackageNotFoundError):
        return version(one.package)
    if "." in one.module or any(p.module == one.module and p is not one for p in PARTS):
        return None
    spec = find_spec(one.module)
    return "unknown" if spec and spec.origin else None


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


# In the child --------------------------------------------------------------------------------------


def _try(names: list[str], tell: Tell) -> None:
    """Try ``names`` in turn and tell of each: why it failed, or its facts."""
    trials = {DRIVER: _driver_answers, "torch": _torch_computes, RUNTIME: _onnxruntime_computes}
    for name in names:
        try:
            tell(("", trials[name]() if name in trials else importlib.import_module(name) and {}))
        except (Exception, SystemExit) as error:
            tell((f"failed ({type(error).__name__}: {first_line(error)})", {}))


def _driver_answers() -> dict[str, Any]:
    from nbl_export.engine.library import find_gpus

    found = find_gpus()
    gpus = [
        f"{gpu.name}, {_gib(memory)}, compute capability {gpu.compute_capability}, driver {found.driver}"
        for gpu, memory in zip(found.devices, found.memory, strict=True)
    ]
    return {"gpus": gpus, "no_gpu": found.why_none}


def _torch_computes() -> dict[str, Any]:
    """A product in float64, the precision in which the CPU is fast, and why no GPU is used."""
    import torch

    one = torch.ones(2, 2, dtype=torch.float64)
    if float((one @ one).sum()) != 8:
        raise RuntimeError("it computes wrongly")
    from nbl_export.models.load import fast_dtype, hindrance

    return {"fast": fast_dtype(), "no_gpu": hindrance("cuda")}


def _onnxruntime_computes() -> dict[str, Any]:
    """A graph of one affine map, computed; on a GPU, too, where there is a provider for it."""
    import numpy as np
    import onnx
    import onnxruntime

    graph = onnx.parser.parse_model(_GRAPH).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4

    def run_on(provider: str) -> bool:
        session = onnxruntime.InferenceSession(graph, options, providers=[provider])
        (y,) = session.run(None, {"u": np.ones((1, 2), np.float32)})
        if y.tolist() != [[14, 26]]:
            raise RuntimeError(f"{provider} computes wrongly")
        return provider in session.get_providers()

    run_on("CPUExecutionProvider")
    cuda, providers = "CUDAExecutionProvider", onnxruntime.get_available_providers()
    no_gpu = f"version {onnxruntime.__version__} has no {cuda}"
    if cuda in providers:
        try:
            no_gpu = "" if run_on(cuda) else f"{cuda} does not start"
        except Exception as error:  # onnxruntime's exceptions have no common base class
            no_gpu = f"{cuda} does not start ({first_line(error)})"
    return {"providers": [name.removesuffix("ExecutionProvider") for name in providers], "no_gpu": no_gpu}
