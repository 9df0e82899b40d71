"""What a verification finds, part by part, and put together; what decoders and encoders are both judged by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from nbl_export.checks import Check
from nbl_export.verify.case import Case
from nbl_export.verify.loss.figures import Likeness, MethodLoss
from nbl_export.verify.loss.gate import number_checks
from nbl_export.verify.parity.figures import DecoderParity, EncoderParity, EngineParity
from nbl_export.verify.speed.checks import speed_check
from nbl_export.verify.speed.pair import IN_TURNS, Pair, anew_or_why_not, measure_speed
from nbl_export.verify.speed.values import Speed

T = TypeVar("T")
F = TypeVar("F", bound="Found[Any]")
L = TypeVar("L", MethodLoss, Likeness)


@dataclass(frozen=True)
class Found(Generic[T]):
    """What one part of a verification found: a report's ``section``, None if it was not run, verdicts and notes."""

    section: T | None = None
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FoundParity(Found[T]):
    """Of parity also where it is lost, if it is."""

    divergence: str | None = None


@dataclass(frozen=True)
class Measurement:
    """What was measured, as the report's sections; a section that was not run is None and a check says why."""

    parity: DecoderParity | EncoderParity | None = None
    divergence: str | None = None
    method_loss: MethodLoss | Likeness | None = None
    speed: Speed | None = None
    engine_parity: EngineParity | None = None
    engine_speed: Speed | None = None
    checks: tuple[Check, ...] = ()
    notes: tuple[str, ...] = ()


def put_together(
    parity: FoundParity[DecoderParity] | FoundParity[EncoderParity],
    loss: Found[MethodLoss] | Found[Likeness],
    speed: Found[Speed],
    engine_build: Found[None] | None = None,
    engine_parity: Found[EngineParity] | None = None,
    engine_speed: Found[Speed] | None = None,
) -> Measurement:
    """The parts of a verification as one value, checks and notes in their order."""
    parts: tuple[Found[Any] | None, ...] = (parity, loss, speed, engine_build, engine_parity, engine_speed)
    run = [part for part in parts if part is not None]
    return Measurement(
        parity=parity.section,
        divergence=parity.divergence,
        method_loss=loss.section,
        speed=speed.section,
        engine_parity=engine_parity.section if engine_parity else None,
        engine_speed=engine_speed.section if engine_speed else None,
        checks=tuple(check for part in run for check in part.checks),
        notes=tuple(note for part in run for note in part.notes),
    )


def clocked(measure: Callable[[], F]) -> F:
    """What a part found, with how long it took in the first of its checks: the others judge what was measured with it.

    A part that was not run has no time.
    """
    begin = time.perf_counter()
    found = measure()
    if found.section is None or not found.checks:
        return found
    first, *others = found.checks
    return replace(found, checks=(replace(first, seconds=time.perf_counter() - begin), *others))


def judged(
    section: T, failures: Iterable[str], within: str, lost: Callable[[], str | None]
) -> FoundParity[T]:
    """Parity's ``section`` with its verdict: ``within`` says what passed; ``lost`` finds where what failed is lost."""
    failed = tuple(failures)
    if not failed:
        return FoundParity(section, (Check("parity", "passed", within),))
    where = lost()
    return FoundParity(
        section,
        (Check("parity", "failed", "; ".join([*failed, *([where] if where else [])])),),
        divergence=where,
    )


def method_loss(case: Case, measure: Callable[[], L]) -> Found[L]:
    """What linearizing costs, if that is measured."""
    if case.settings.quality:
        section = measure()
        return Found(section, number_checks(section))
    return Found(checks=(Check("method loss", "skipped", "--no-quality"),))


def timed(
    case: Case, notes: tuple[str, ...], pair_with: Callable[[Path], Pair], contexts: Sequence[int]
) -> Found[Speed]:
    """The speed of the pair with the unmodified graph, and whether it can be believed, if it is measured.

    Where both do not fit into memory they take turns.
    """
    if why := case.why_not_timed:
        return Found(checks=(Check("speed", "skipped", why),), notes=notes)
    assert case.baseline is not None  # or it would say so
    pair = pair_with(case.baseline)
    anew = anew_or_why_not(pair.base, pair.linearized)
    if isinstance(anew, str):
        return Found(checks=(Check("speed", "skipped", anew),), notes=notes)
    section = measure_speed(pair, contexts, case.settings.rounds, case.listener, anew)
    return Found(section, (speed_check(section),), (*notes, *[IN_TURNS] * anew))


def fitting_contexts(
    limit: int | None, contexts: Sequence[int], room: int = 0
) -> tuple[list[int], tuple[str, ...]]:
    """Those of ``contexts`` that leave ``room`` more of the model's ``limit`` positions; a note names the others."""
    fitting = [c for c in contexts if limit is None or c + room <= limit]
    dropped = sorted(set(contexts) - set(fitting))
    note = f"Speed at {', '.join(map(str, dropped))} tokens is not measured: the model has {limit} positions."
    return fitting or [max(2, (limit or 16) // 2)], (note,) if dropped else ()
