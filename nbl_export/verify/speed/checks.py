"""Whether measured speedups can be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from nbl_export.checks import Check

# A cell, who is above its ceiling in it, and the explanation.
Explained = tuple[str, str, Mapping[str, Any]]


def speed_check(speed: Mapping[str, Any]) -> Check:
    """Whether the figures can be believed. A doubt is no verdict on the graph, and leaves the check open."""
    return ceilings_check("speed", explained_cells(speed), "skipped")


def suspect(cell: Mapping[str, Any]) -> bool:
    """Whether the cell's speedup is above its ceiling for no reason that is seen."""
    return bool((cell.get("explanation") or {}).get("suspect"))


def explained_cells(speed: Mapping[str, Any]) -> list[Explained]:
    """A report of an earlier version has no reasons."""
    return [
        (f"{c['phase']} {c['context']}", "linearized", reason)
        for c in speed["cells"]
        if (reason := c.get("explanation"))
    ]


def ceilings_check(name: str, found: Sequence[Explained], doubt: Literal["failed", "skipped"]) -> Check:
    """Whether every speedup above its ceiling has its reason; ``doubt`` is the status of one with a suspect cell."""
    suspect = [
        f"{cell}, {who}: {e['saved_ms']:.2f} ms saved at least, {e['excess_ms']:.2f} of them beyond the ceiling, "
        f"but {e['gone_ms']:.2f} in nodes that are gone"
        for cell, who, e in found
        if e["suspect"]
    ]
    believed = "no speedup above its ceiling, or what it comes from is gone from the graph"
    return Check(name, doubt if suspect else "passed", "; ".join(suspect) or believed)
