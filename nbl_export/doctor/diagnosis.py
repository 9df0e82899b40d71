"""What is there, what is missing and what it would bring, and what will not go well.

    packages ── tried in a child process ────────────┐
    the NVIDIA driver ── asked there, too ───────────┼──▶ Diagnosis: machine, parts, problems, and what is lacking
    pyproject's ranges ──────────────────────────────┘

The main job runs here if nothing is ``lacking``: Python and every package that is always needed are there, in range,
and work, and one runtime has computed a graph.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nbl_export import __version__
from nbl_export.doctor.machine import Machine, this_machine
from nbl_export.doctor.ranges import Clash, Ranges, clashes, own_ranges, within
from nbl_export.doctor.trials import UNKNOWN, Trial, try_all, versions
from nbl_export.errors import MissingDependencyError
from nbl_export.installed import find_origin, pip_command
from nbl_export.parts import ALWAYS, PARTS, Part, part
from nbl_export.progress import Listener, Silent

RUNTIME = "onnxruntime"
_ROOM = 1 << 30  # bytes of the temporary folder: states of a small calibration, a profile, a graph in parts
_UTF8 = {"utf-8", "utf8"}


@dataclass(frozen=True)
class Found:
    """A package: its ``version`` if it is there, the ``error`` where it does not work, and what it is for.

    ``pip`` is the line that brings it; ``takes`` the range of versions; ``detail`` what the trial found out. ``extra``
    is as in :class:`nbl_export.parts.Part`.
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
    def in_range(self) -> bool:
        return self.version is None or not self.takes or within(self.version, self.takes)


@dataclass(frozen=True)
class Diagnosis:
    """The findings. ``lacking`` are sentences on what keeps the main job from running, ``problems`` on the rest."""

    version: str
    origin: str
    machine: Machine
    parts: tuple[Found, ...]
    lacking: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def runs_here(self) -> bool:
        return not self.lacking


def diagnose(listener: Listener | None = None) -> Diagnosis:
    """Look at this machine and this environment; nothing is changed, and nothing is downloaded.

    Raises :class:`MissingDependencyError` without packaging, which reads versions.
    """
    try:
        ranges = own_ranges()
    except ImportError:
        raise MissingDependencyError(f"doctor needs packaging: {part('packaging').pip}.") from None
    wanted = [p for p in PARTS if p.extra is None or not ranges.of or ranges.takes(p.package, p.extra)]
    there = versions(wanted)
    trials = try_all([p.module for p in wanted if p.package in there], listener or Silent())
    machine = this_machine(trials)
    found = tuple(_found(one, there, trials, ranges, wanted) for one in wanted)
    return Diagnosis(
        __version__,
        str(find_origin()),
        machine,
        found,
        tuple(lacking(machine, found, ranges.python)),
        tuple(problems(machine, found, list(clashes(there)))),
    )


def _found(
    one: Part, there: Mapping[str, str], trials: Mapping[str, Trial], ranges: Ranges, wanted: Sequence[Part]
) -> Found:
    version = there.get(one.package)
    takes = None if one.extra is None else ranges.takes(one.package, one.extra)
    trial = trials[one.module] if version is not None else Trial()
    return Found(
        package=one.package,
        version=trial.facts.get("version", version) if version == UNKNOWN else version,
        error=trial.error,
        use=one.use,
        detail=", ".join(trial.facts.get("providers", ())),
        extra=one.extra,
        takes=str(takes.specifier) if takes else "",
        pip=_line(one, there, wanted),
    )


def _line(one: Part, there: Mapping[str, str], wanted: Sequence[Part]) -> str:
    """The pip line of a part; what has the same module must go first, or pip leaves a mixture of both."""
    others = [p.package for p in wanted if p.module == one.module and p is not one and p.package in there]
    return f"{pip_command('uninstall -y')} {' '.join(others)} && {one.pip}" if others else one.pip


def lacking(machine: Machine, parts: Sequence[Found], python: str) -> Iterator[str]:
    """A sentence for each thing without which the main job does not run."""
    if python and not within(machine.python, python):
        yield f"Python {machine.python} runs this, and {python} is needed: make an environment with another one."
    for one in parts:
        if one.extra != ALWAYS:
            continue
        if one.version is None:
            yield f"{one.package} is missing ({one.use}): {one.pip}."
        elif one.error:
            yield _broken(one)
        elif not one.in_range:
            yield _out_of_range(one)
    runtimes = [one for one in parts if part(one.package).module == RUNTIME]
    if not any(one.works for one in runtimes):
        broken = next((one for one in runtimes if one.error), None)
        lines = " or, for CUDA, ".join(one.pip for one in runtimes)
        yield _broken(broken) if broken else f"No runtime is there for graphs: {lines}, never both."


def problems(machine: Machine, parts: Sequence[Found], found: Sequence[Clash]) -> Iterator[str]:
    """A sentence for each thing that will not go well, and leaves the main job alone."""
    modules: dict[str, list[Found]] = {}
    for one in parts:
        if one.version is not None:
            modules.setdefault(part(one.package).module, []).append(one)
    for several in modules.values():
        if len(several) > 1:
            names = [one.package for one in several]
            yield (
                f"{' and '.join(names)} are both installed and share one module: {pip_command('uninstall -y')} "
                f"{' '.join(names)}, then {' or '.join(part(name).pip for name in names)}."
            )
    runs = any(one.works for one in parts if part(one.package).module == RUNTIME)
    for one in parts:
        if one.extra == ALWAYS:
            continue
        if one.error and (runs or part(one.package).module != RUNTIME):
            yield _broken(one)
        elif not one.in_range:
            yield _out_of_range(one)
    for clash in found:
        yield (
            f"{clash.package} {clash.version} takes {clash.name}{clash.takes}, and {clash.installed} is installed: "
            f"{pip_command('install')} {shlex.quote(clash.name + clash.takes)}, or keep one of them in an environment "
            "of its own."
        )
    if machine.gpus:
        for name in sorted(machine.no_gpu):
            yield f"There is an NVIDIA GPU, but {name} does not use it: {machine.no_gpu[name]}."
    yield from _surroundings(machine)


def _surroundings(machine: Machine) -> Iterator[str]:
    if machine.encoding.lower() not in _UTF8:
        yield (
            f"The locale's encoding is {machine.encoding}, in which names and tables lose signs: set LANG=C.UTF-8 or "
            "PYTHONUTF8=1."
        )
    if not machine.here.folder:
        yield "The folder that this was started in is gone: change to one that is there."
    place = machine.temporary
    if not place.folder:
        yield "No folder for temporary files can be written to: set TMPDIR to one that can."
    elif place.free is not None and place.free < _ROOM:
        yield (
            f"{place.folder}, the folder for temporary files, has {place.free / 2**20:,.0f} MiB free: free some "
            "space, or set TMPDIR to a folder with more."
        )


def _broken(one: Found) -> str:
    again = f"{pip_command('install --force-reinstall')} {shlex.quote(one.package + one.takes)}"
    return f"{one.package} {one.version} is installed, and trying it {one.error}: {again}."


def _out_of_range(one: Found) -> str:
    line = f"{pip_command('install')} {shlex.quote(one.package + one.takes)}"
    return f"{one.package} {one.version} is installed, and {one.takes} is needed: {line}."
