"""What a test has replaced, and whether something depends on it: the kept result of another test is then not taken."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection
from functools import cache
from types import ModuleType
from typing import Any

import pytest

from nbl_export.report.schema import Header
from tests.imports import imports, modules

# Every report of the tests is held to its schema by a method that is replaced for the whole run; pytest, too, replaces
# something of its configuration.
HARMLESS = (os.environ, Header)
_patches: weakref.WeakSet[pytest.MonkeyPatch] = weakref.WeakSet()


def follow() -> None:
    """From now on, know of every monkeypatch."""
    made = pytest.MonkeyPatch.__init__

    def followed(self: pytest.MonkeyPatch) -> None:
        made(self)
        _patches.add(self)

    pytest.MonkeyPatch.__init__ = followed  # type: ignore[method-assign]


def replaced_for(room: str, without: Collection[str] = ()) -> bool:
    """Whether anything is replaced that the modules of ``room`` could depend on: all but what they do not import.

    ``room`` is the dotted name of a module or of a folder of modules; ``without`` are packages whose versions and
    answers change nothing there.
    """
    places = (place for patch in _patches for place, *_ in (*patch._setattr, *patch._setitem))
    return any(
        not isinstance(place, pytest.Config)
        and all(place is not harmless for harmless in HARMLESS)
        and _matters(place, room, without)
        for place in places
    )


def _matters(place: Any, room: str, without: Collection[str]) -> bool:
    """Data says not whose it is, so it does; so does everything of other packages."""
    if isinstance(place, ModuleType):
        where: Any = place.__name__
    else:
        where = getattr(place, "__module__", None)
    if str(where).partition(".")[0] in without:
        return False
    return where not in _modules() or where in _needed(room)


@cache
def _modules() -> frozenset[str]:
    return frozenset(modules())


@cache
def _needed(room: str) -> frozenset[str]:
    """The modules of ``room`` and all of nbl_export that they import, at any depth, wherever the import stands."""
    known, found = modules(), set()
    open_ = [name for name in known if name == room or name.startswith(f"{room}.")]
    while open_:
        name = open_.pop()
        if name not in found:
            found.add(name)
            open_ += [target for target, _ in imports(known[name].read_text(encoding="utf-8"), known)]
    return frozenset(found)
