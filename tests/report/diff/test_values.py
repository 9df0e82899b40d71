"""When a difference is one: by hand, for every kind of figure, and both ways round."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest

from nbl_export.checks import Check
from nbl_export.report.diff.values import (
    Better,
    Change,
    Diff,
    Fact,
    Figure,
    Side,
    change,
    diff_of,
    section,
)
from nbl_export.settings import DiffBounds

MIRRORED = {"better": "worse", "worse": "better", "only in A": "only in B", "only in B": "only in A"}


def both(a: Fact | None, b: Fact | None) -> str:
    """The effect, after a look from the other side, which must be its mirror."""
    there, back = change("x", a, b), change("x", b, a)
    assert back.effect == MIRRORED.get(there.effect, there.effect)
    assert (back.a, back.b) == (there.b, there.a)
    return there.effect


def fact(value: float | str, better: Better = "", **noise: float) -> Fact:
    return Fact(Figure(value, **noise), better)


@pytest.mark.parametrize(
    ("a", "b", "better", "effect"),
    [
        (1, 1, "lower", "same"),
        (1, 2, "lower", "worse"),
        (2, 1, "lower", "better"),
        (1, 2, "higher", "better"),
        (1, 2, "", "changed"),
        ("x", "x", "", "same"),
        ("x", "y", "", "changed"),
        (nan, nan, "lower", "same"),
        (1.0, nan, "lower", "worse"),
        (nan, 1.0, "lower", "better"),
        (1.0, nan, "higher", "worse"),
        (nan, 1.0, "higher", "better"),
        (1.0, nan, "", "changed"),
        (1.0, inf, "lower", "worse"),
        ("passed", "failed", "passed", "worse"),
        ("skipped", "failed", "passed", "worse"),
        ("failed", "skipped", "passed", "better"),
        ("passed", "skipped", "passed", "changed"),
    ],
)
def test_exact_figures(a: float | str, b: float | str, better: Better, effect: str) -> None:
    assert both(fact(a, better), fact(b, better)) == effect


def test_what_is_missing_is_only_on_the_other_side() -> None:
    assert both(fact(1), None) == "only in A" and both(None, fact(1)) == "only in B"


@pytest.mark.parametrize(
    ("difference", "effect"), [(0.0, "same"), (0.09, "within noise"), (0.1, "within noise"), (0.11, "worse")]
)
def test_two_standard_errors_of_the_difference(difference: float, effect: str) -> None:
    """Errors of 0.03 and 0.04 are one of 0.05."""
    a, b = fact(0.0, "lower", se=0.03), fact(difference, "lower", se=0.04)
    assert both(a, b) == effect


def test_an_error_that_is_not_known_decides_nothing() -> None:
    assert both(fact(1.0, "lower", se=0.1), fact(9.0, "lower", se=nan)) == "of unknown noise"
    assert both(fact(1.0, "lower", se=0.1), fact(inf, "lower", se=nan)) == "worse"


@pytest.mark.parametrize(
    ("least", "most", "effect"),
    [
        (1.25, 1.4, "better"),
        (1.2, 1.4, "within noise"),  # they touch
        (1.15, 1.4, "within noise"),
        (0.9, 1.09, "worse"),
        (-inf, inf, "of unknown noise"),
        (nan, nan, "of unknown noise"),
    ],
)
def test_intervals_that_are_apart(least: float, most: float, effect: str) -> None:
    a = fact(1.15, "higher", least=1.1, most=1.2)
    assert both(a, fact(1.3 if most > 1.2 else 1.0, "higher", least=least, most=most)) == effect


def test_what_does_not_compare_is_neither_better_nor_worse() -> None:
    found = change("x", fact(1, "lower"), fact(9, "lower"), "on another machine")
    assert found.effect == "on another machine"
    assert change("x", fact(1, "lower"), fact(1, "lower"), "on another machine").effect == "same"
    assert change("x", fact(1, "lower"), None, "on another machine").effect == "only in A"


def test_lists_say_what_came_and_went() -> None:
    a, b = (Fact(Figure(2), members=m) for m in (("2", "3"), ("3", "4.mlp")))
    found = change("layers", a, b)
    assert (found.effect, found.note) == ("changed", "added 4.mlp; removed 2")
    assert change("layers", b, a).note == "added 2; removed 4.mlp"
    assert change("layers", a, replace(a, members=("3", "2"))).effect == "same"


def test_what_stands_beside_a_figure_is_of_both_sides() -> None:
    a, b = (Fact(Figure(v), detail=d) for v, d in ((1, "5 ms"), (2, "6 ms")))
    assert change("x", a, b).note == "5 ms → 6 ms" and change("x", a, a).note == "5 ms"
    assert change("x", a, None).note == "5 ms" and change("x", replace(a, detail=""), b).note == "none → 6 ms"


def found(*changes: Change, checks: tuple[Check, ...] = ()) -> Diff:
    part = replace(section("s", {}, {}), changes=changes)
    return diff_of("graph", (Side("a"), Side("b")), (part,), checks, DiffBounds())


def test_a_difference_is_none_noise_or_one() -> None:
    same, noise = (change("x", fact(0.0, se=0.1), fact(v, se=0.1)) for v in (0.0, 0.1))
    other = change("x", fact(0.0, se=0.1), fact(0.9, se=0.1))
    assert found().difference == found(same).difference == "none"
    assert found(same, noise).difference == "noise"
    assert found(noise, other).difference == "changed"
    assert found(change("x", None, fact(1))).difference == "changed"


def test_the_verdict_is_that_of_the_gates() -> None:
    passed, failed = (Check("c", status, "") for status in ("passed", "failed"))  # type: ignore[arg-type]
    assert (found().verdict, found().passed) == ("no gate", True)
    assert (found(checks=(passed,)).verdict, found(checks=(passed,)).passed) == ("passed", True)
    assert (found(checks=(passed, failed)).verdict, found(checks=(failed,)).passed) == ("failed", False)


def test_a_section_has_every_name_of_both_sides() -> None:
    part = section("s", {"x": fact(1), "y": fact(2)}, {"y": fact(2), "z": fact(3)}, notes=("why",))
    assert [(c.what, c.effect) for c in part.changes] == [
        ("x", "only in A"),
        ("y", "same"),
        ("z", "only in B"),
    ]
    assert part.notes == ("why",)
