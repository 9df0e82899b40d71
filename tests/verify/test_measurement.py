"""The parts of a verification, and how they become one value: nothing is lost, nothing is run that decides nothing."""

from __future__ import annotations

import math
import time
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import pytest

from nbl_export.checks import Check
from nbl_export.settings import VerifySettings
from nbl_export.verify.loss.figures import MethodLoss
from nbl_export.verify.measurement import (
    Found,
    FoundParity,
    Measurement,
    clocked,
    fitting_contexts,
    judged,
    method_loss,
    put_together,
)
from nbl_export.verify.parity.figures import EngineParity


def check(name: str) -> Check:
    return Check(name, "passed", "")


def test_what_is_within_its_gates_is_not_searched_for_where_it_is_lost() -> None:
    found = judged("section", [], "all within", lambda: pytest.fail("searched"))
    assert found == FoundParity("section", (Check("parity", "passed", "all within"),))
    assert found.divergence is None


def test_what_is_not_says_each_gate_and_where_it_is_lost() -> None:
    found = judged("section", ["one", "two"], "all within", lambda: "at layer 3")
    assert found.checks == (Check("parity", "failed", "one; two; at layer 3"),)
    assert (found.section, found.divergence) == ("section", "at layer 3")


def test_what_was_measured_together_is_timed_once() -> None:
    checks = (Check("a", "passed", ""), Check("b", "failed", ""))
    spent = 0.05

    def measured() -> Found[str]:
        time.sleep(spent)
        return Found("a section", checks)

    first, second = clocked(measured).checks
    assert first.seconds is not None and spent <= first.seconds < 60 * spent
    assert replace(first, seconds=None) == checks[0] and second == checks[1]


def test_what_was_not_run_has_no_time() -> None:
    left_out = Found[str](checks=(Check("speed", "skipped", "--no-speed"),))
    assert clocked(lambda: left_out) == left_out
    assert clocked(lambda: Found("a section")) == Found("a section")


def test_checks_and_notes_come_in_the_order_of_the_parts() -> None:
    parity: Any = FoundParity("parity", (check("a"),), ("first",), divergence="where")
    loss: Any = Found("loss", (), ("second",))
    speed: Any = Found({"cells": []}, (check("b"), check("c")))
    found = put_together(parity, loss, speed)
    assert found == Measurement(
        "parity",  # type: ignore[arg-type]
        "where",
        "loss",  # type: ignore[arg-type]
        {"cells": []},
        checks=(check("a"), check("b"), check("c")),
        notes=("first", "second"),
    )
    engines = EngineParity()
    built: Found[None] = Found(checks=(check("d"),))
    with_engines = put_together(
        parity, loss, speed, built, Found(engines, (check("e"),)), Found({"gpu": "x"}, notes=("third",))
    )
    assert [c.name for c in with_engines.checks] == ["a", "b", "c", "d", "e"]
    assert with_engines.notes == ("first", "second", "third")
    assert (with_engines.engine_parity, with_engines.engine_speed) == (engines, {"gpu": "x"})
    with pytest.raises(FrozenInstanceError):
        with_engines.parity = None  # type: ignore[misc]


@pytest.mark.parametrize(
    ("limit", "room", "fitting", "dropped"),
    [
        (None, 1, [16, 64, 512], ""),
        (512, 0, [16, 64, 512], ""),
        (512, 1, [16, 64], "512"),
        (64, 1, [16], "64, 512"),
        (16, 1, [8], "16, 64, 512"),  # half of the positions where nothing that was asked for fits
        (2, 1, [2], "16, 64, 512"),
    ],
)
def test_contexts_that_a_model_has_positions_for(
    limit: int | None, room: int, fitting: list[int], dropped: str
) -> None:
    found, notes = fitting_contexts(limit, (16, 64, 512), room)
    assert found == fitting
    told = f"Speed at {dropped} tokens is not measured: the model has {limit} positions."
    assert notes == ((told,) if dropped else ())


def test_a_loss_that_is_no_number_fails_and_is_still_shown() -> None:
    case: Any = SimpleNamespace(settings=VerifySettings())
    loss = MethodLoss(2, 64, 4.0, math.nan, math.nan, math.nan, 0.1, 0.01)
    found = method_loss(case, lambda: loss)
    assert found.section is loss and [(c.name, c.status) for c in found.checks] == [("method loss", "failed")]
    assert method_loss(case, lambda: replace(loss, perplexity_ratio=1.1)).checks == ()
