"""How often layers are chosen by resampled documents, where that can be known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from nbl_export.linearize.search import MeasuredSets, count_blocks
from nbl_export.linearize.selection import Sums
from nbl_export.linearize.stability import stability
from nbl_export.settings.choices import FAR_LOOK_UP


def sets_of(
    costs: dict[int, list[float]], synthetic: dict[int, float] | None = None, kinds: Sequence[str] = ("a",)
) -> MeasuredSets:
    """Sets whose blocks cost so much, each alone, of each document of ten tokens and of each kind of synthetic rows."""
    known = {
        f"{','.join(map(str, chosen))} part 0": Sums(
            {str(n): (10.0, sum(costs[b][n] for b in chosen), 0.0) for n in range(len(costs[0]))},
            {kind: (1.0, sum(synthetic[b] for b in chosen), 0.0) for kind in kinds} if synthetic else {},
        )
        for chosen in [(b,) for b in costs] + [(0, b) for b in costs if b]
    }
    anything: Any = None
    return MeasuredSets(anything, costs, known, anything)


def shares(sets: MeasuredSets, blocks: int = 3) -> dict[Any, float]:
    return stability(sets, [(0,), (0, 1)], range(blocks), count_blocks, 0)


def test_what_every_document_says_is_certain_and_what_they_are_divided_on_is_not() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=12)
    # 0 is best by every document. Half of the documents prefer 1, half 2.
    costs = {0: [0.1] * 12, 1: (5 + noise).tolist(), 2: (5 - noise + 2 * noise.mean()).tolist()}
    found = shares(sets_of(costs))
    assert found[0] == 1.0
    assert 0.25 < found[1] < 0.75 and found[1] + found[2] == pytest.approx(1)
    costs[2] = [9.0] * 12
    assert shares(sets_of(costs)) == {0: 1.0, 1: 1.0, 2: 0.0}


# 0.3 of a nat counts beside the text, of those near as a mean: 0.2 apart for each token is 0.67 of them.
@pytest.mark.parametrize(
    ("nats", "kinds", "first"),
    [
        (0.6, "ab", 1.0),
        (0.7, "ab", 0.0),
        (0.3, ("a", "b", FAR_LOOK_UP), 1.0),
        (0.4, ("a", "b", FAR_LOOK_UP), 0.0),
    ],
)
def test_in_every_sample_a_far_look_up_counts_as_much_as_all_other_synthetic_rows(
    nats: float, kinds: Sequence[str], first: float
) -> None:
    costs = {0: [0.1] * 12, 1: [3.0] * 12, 2: [5.0] * 12}
    assert shares(sets_of(costs, {0: 0.0, 1: nats, 2: 0.0}, kinds)) == {0: 1.0, 1: first, 2: 1 - first}


def test_a_set_is_compared_with_its_base_on_the_rows_that_both_were_measured_on() -> None:
    sets = sets_of({0: [0.1] * 12, 1: [5.0] * 12, 2: [3.0] * 12})
    # The documents go on in rows on which 1 was not tried: there 0 costs 4, and 2 costs 3 more.
    more = {"0 part 1": 4.0, "0,2 part 1": 7.0}
    sets._known.update({k: Sums({str(n): (10.0, kl, 0.0) for n in range(12)}) for k, kl in more.items()})
    assert shares(sets) == {0: 1.0, 1: 0.0, 2: 1.0}


def test_one_document_says_nothing() -> None:
    assert shares(sets_of({0: [1.0], 1: [2.0], 2: [3.0]})) == {}
