"""What every report begins with, and how any of them is read: of a run, a bench, an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from nbl_export.checks import Check
from nbl_export.errors import InputError
from nbl_export.files import read_json
from nbl_export.models.source import ModelIdentity
from nbl_export.records import from_json, to_json
from nbl_export.report.environment import Environment


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


def load_judged(
    kind: type[H],
    path: Path,
    what: str,
    remedy: str,
    older: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] | None = None,
) -> H:
    """Read a ``kind`` of report from JSON; :class:`InputError` calls it ``what`` and says the ``remedy``.

    ``older`` makes what ``kind`` is of other schemas that are still read.
    """
    raw = read_json(path, f"The {what}", remedy)
    schema = raw.get("schema") if isinstance(raw, dict) else None
    upgrade = (older or {}).get(str(schema))
    if schema != kind.SCHEMA and upgrade is None:
        raise InputError(f"{path} is no {what} of this version ({kind.SCHEMA}): {remedy}.")
    try:
        raw = upgrade(raw) if upgrade else raw
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}.") from None
    body = {k: v for k, v in raw.items() if k not in ("schema", "verdict")}
    return from_json(kind, body, str(path), remedy)
