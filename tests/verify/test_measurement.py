"""What a verification finds: where parity is lost is searched for only if it is, and what was skipped has no time."""

from __future__ import annotations

import time

import pytest

from nbl_export.checks import Check
from nbl_export.verify.measurement import Measurement
from nbl_export.verify.speed.pair import fitting_contexts


def test_what_is_within_its_gates_is_not_searched_for_where_it_is_lost() -> None:
    found = Measurement()
    found.check_parity([], "all within", lambda: pytest.fail("searched"))
    assert found.checks == [Check("parity", "passed", "all within")] and found.divergence is None


@pytest.mark.parametrize(("where", "said"), [("at layer 3", "one; two; at layer 3"), (None, "one; two")])
def test_what_is_not_says_each_gate_and_where_it_is_lost(where: str | None, said: str) -> None:
    found = Measurement()
    found.check_parity(["one", "two"], "all within", lambda: where)
    assert found.checks == [Check("parity", "failed", said)] and found.divergence == where


def test_what_was_measured_together_is_timed_once_and_what_was_skipped_is_not() -> None:
    found, spent = Measurement(), 0.05
    for status in ("passed", "skipped"):
        with found.clock():
            time.sleep(spent)
            found.check("a", status, "")  # type: ignore[arg-type]
            found.check("b", "failed", "")
    with found.clock():
        pass
    first, *others = [check.seconds for check in found.checks]
    assert first is not None and spent <= first < 60 * spent and others == [None] * 3


@pytest.mark.parametrize(
    ("limit", "room", "fitting", "dropped"),
    [
        (None, 1, [16, 64, 512], ""),
        (512, 0, [16, 64, 512], ""),
        (512, 1, [16, 64], "512"),
        (16, 1, [8], "16, 64, 512"),  # half of the positions where nothing that was asked for fits
        (2, 1, [2], "16, 64, 512"),
    ],
)
def test_contexts_that_a_model_has_positions_for(
    limit: int | None, room: int, fitting: list[int], dropped: str
) -> None:
    found = Measurement()
    assert fitting_contexts(found, limit, (16, 64, 512), room) == fitting
    told = f"Speed at {dropped} tokens is not measured: the model has {limit} positions."
    assert found.notes == ([told] if dropped else [])
