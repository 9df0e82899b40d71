"""What storing W costs is said, and recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export.rewrite.replace import rewrite_file, rewrite_summary, storing_cost
from tests.fixtures_graph import plan_by_hand
from tests.listening import Notes


def test_the_worst_layer_is_named_and_little_is_not_worth_a_line() -> None:
    assert storing_cost({}) == storing_cost({1: 0.001, 2: 0.004}) == ""
    assert storing_cost({1: 0.02, 7: 0.1}) == (
        "Storing W changes W u by 6.0% on average, most in layer 7 (10.0%), measured on the probe."
    )


@pytest.mark.parametrize(("name", "least", "most"), [("int4", 0.05, 0.2), ("int8", 0.002, 0.02)])
def test_a_quantized_rewrite_says_and_records_it(
    baseline_in: Callable[[str], Path],
    stories_out: Path,
    tmp_path: Path,
    name: str,
    least: float,
    most: float,
) -> None:
    plan, listener = plan_by_hand(stories_out, (1, 3)), Notes()
    result = rewrite_file(baseline_in(name), plan, tmp_path / "model.onnx", listener)
    stored = rewrite_summary(result).stored
    assert [s.layer for s in stored] == [1, 3] and all(least < s.error < most for s in stored)
    assert [note for note in listener.notes if note.startswith("Storing W changes W u by")]
