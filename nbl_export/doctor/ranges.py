"""The versions that nbl-export takes, as ``pyproject.toml`` says them, and what other packages take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.datafile import read_table
from nbl_export.installed import PACKAGE, PROJECT, find_distribution, is_clone
from nbl_export.parts import ALWAYS

if TYPE_CHECKING:
    from packaging.requirements import Requirement


@dataclass(frozen=True)
class Ranges:
    """``python`` is the range of Python; ``of`` has the requirements by extra that are for this machine."""

    python: str = ""
    of: Mapping[str, tuple[Requirement, ...]] = field(default_factory=dict)

    def takes(self, package: str, extra: str | None = None) -> Requirement | None:
        """The requirement for ``package``, of its ``extra`` or of any; None if there is none here."""
        extras = self.of if extra is None else [extra]
        return next((r for e in extras for r in self.of.get(e, ()) if _same(r.name, package)), None)


def own_ranges(package: Path = PACKAGE) -> Ranges:
    """Those of the copy in the folder ``package``: of its clone, else as pip recorded them; none without either."""
    if is_clone(package.parent):
        project = read_table(package.parent / PROJECT)["project"]
        listed = {ALWAYS: project.get("dependencies", []), **project.get("optional-dependencies", {})}
        return Ranges(
            project.get("requires-python", ""), {extra: _read(each, "") for extra, each in listed.items()}
        )
    found = find_distribution(package)
    if found is None:
        return Ranges()
    extras = [ALWAYS, *(found.metadata.get_all("Provides-Extra") or [])]
    lines, plain = found.requires or [], {str(r) for r in _read(found.requires or [], "")}
    of = {
        extra: tuple(r for r in _read(lines, extra) if extra == ALWAYS or str(r) not in plain)
        for extra in extras
    }
    return Ranges(next(iter(found.metadata.get_all("Requires-Python") or []), ""), of)


def _read(lines: Iterable[str], extra: str) -> tuple[Requirement, ...]:
    """The requirements whose markers hold here, and with ``extra``."""
    from packaging.requirements import Requirement

    read = (Requirement(line) for line in lines)
    return tuple(r for r in read if r.marker is None or r.marker.evaluate({"extra": extra}))


def within(version: str, specifier: str) -> bool:
    """Whether a version is in a range; a pre-release counts by its number, what is no version is not judged."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        number = Version(version)
    except InvalidVersion:
        return True
    return SpecifierSet(specifier).contains(number, prereleases=True)


@dataclass(frozen=True)
class Clash:
    """``package`` in ``version`` takes ``name`` in the range ``takes``, and has another one, ``installed``."""

    package: str
    version: str
    name: str
    takes: str
    installed: str


def clashes(packages: Iterable[str]) -> Iterator[Clash]:
    """What installed ``packages`` ask of others, which are there in another version, as ``pip check`` has it."""
    for package in packages:
        try:
            found = distribution(package)
        except PackageNotFoundError:
            continue
        for need in _read(found.requires or [], ""):
            try:
                installed = distribution(need.name).version
            except PackageNotFoundError:
                continue
            if not within(installed, str(need.specifier)):
                yield Clash(package, found.version, need.name, str(need.specifier), installed)


def _same(one: str, other: str) -> bool:
    from packaging.utils import canonicalize_name

    return canonicalize_name(one) == canonicalize_name(other)
