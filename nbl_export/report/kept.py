"""What an earlier verification measured on the very same graphs, and a later one did not: kept, with its date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nbl_export.checks import Check
from nbl_export.report.schema import Kept, Report


@dataclass(frozen=True)
class _Section:
    """One that a verification can leave out: its ``checks``, and the check that says that it was ``left_out``."""

    checks: frozenset[str]
    left_out: str
    of_engines: bool = False


SECTIONS: Mapping[str, _Section] = {
    "method_loss": _Section(frozenset({"method loss", "KL bound", "perplexity bound"}), "method loss"),
    "speed": _Section(frozenset({"speed"}), "speed"),
    "engine_parity": _Section(frozenset({"engine parity", "base engine parity"}), "engine run", True),
    "engine_speed": _Section(frozenset(), "engine run", True),
}


def keeping(report: Report, earlier: Report | None, graphs: Sequence[str], engines: Sequence[str]) -> Report:
    """``report`` with the sections of an ``earlier`` one that it lacks, and with their verdicts.

    Only of the same ``graphs``, and of the same ``engines`` what was measured on them: the names of their files, whose
    digests both reports have. What failed now is not measured, and nothing stands in for it.
    """
    if earlier is None or not _same(report, earlier, graphs):
        return report
    failed = {check.name for check in report.checks if check.status == "failed"}
    engines_run = not failed & {"engine run", *SECTIONS["engine_parity"].checks}
    for name, section in SECTIONS.items():
        found = getattr(earlier, name)
        same = not section.of_engines or (engines_run and _same(report, earlier, engines))
        if found is None or getattr(report, name) is not None or not same:
            continue
        origin = earlier.kept.get(name) or Kept(
            earlier.created,
            earlier.tool_version,
            earlier.environment,
            dict(earlier.settings.get("verify", {})),
        )
        more: dict[str, Any] = {name: found}
        report = replace(report, **more, kept={**report.kept, name: origin})
        report = replace(report, checks=_checks(report, earlier, section, origin))
    return report


def _same(report: Report, earlier: Report, names: Sequence[str]) -> bool:
    digests = [(report.hashes.get(name), earlier.hashes.get(name)) for name in names]
    return bool(digests) and all(a is not None and a == b for a, b in digests)


def _checks(report: Report, earlier: Report, section: _Section, origin: Kept) -> tuple[Check, ...]:
    measured = f"measured {origin.created}"
    # That the loss was skipped is no verdict on it.
    kept = {
        c.name: c
        for c in earlier.checks
        if c.name in section.checks and (c.name, c.status) != ("method loss", "skipped")
    }
    found: list[Check] = []
    for check in report.checks:
        if check.name != section.left_out:
            found.append(check)
        elif own := kept.pop(check.name, None):
            found.append(_dated(own, f"{measured}, now {check.detail}"))
        else:
            found.append(replace(check, detail=f"{check.detail}; what is shown was {measured}"))
    return (*found, *(_dated(check, measured) for check in kept.values()))


def _dated(check: Check, when: str) -> Check:
    # Kept more than once, it has its first date alone.
    return replace(check, detail=f"{check.detail.partition(' (measured ')[0]} ({when})")
