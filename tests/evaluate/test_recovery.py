"""Recovery and its standard error: by hand, against a bootstrap, and against repeated sampling."""

from __future__ import annotations

import numpy as np
import pytest

from nbl_export.evaluate.recovery import Paired, mean, recovery


def answers(rng: np.random.Generator, count: int, base: float, flips: float) -> Paired:
    """Right or wrong of two models that mostly agree."""
    own = (rng.random(count) < base).astype(float)
    flipped = rng.random(count) < flips
    return Paired.of(own, np.where(flipped, rng.random(count) < 0.3, own), np.full(count, 0.25))


def test_by_hand() -> None:
    pair = Paired.of([1, 1, 0, 1], [1, 0, 0, 1], [0.5] * 4)
    found = recovery([pair])
    assert found is not None
    # R = 2/3; l − R b = 1/3, −2/3, 0, 1/3: variance 2/9, mean base 3/4.
    assert found.value == pytest.approx(2 / 3)
    assert found.se == pytest.approx(np.sqrt(2 / 9 / 4) / 0.75)
    assert pair.difference.value == -0.25
    assert pair.difference.se == pytest.approx(np.std([0, -1, 0, 0], ddof=1) / 2)
    assert not pair.clear and recovery([pair], above_chance=True) is None


def test_the_same_answers_leave_everything_without_error() -> None:
    pair = Paired.of([1, 0, 1, 1], [1, 0, 1, 1], [0] * 4)
    found = recovery([pair])
    assert found is not None and (found.value, found.se) == (1.0, 0.0)


def test_the_error_is_the_bootstraps() -> None:
    rng = np.random.default_rng(0)
    pairs = [answers(rng, 400, 0.7, 0.2), answers(rng, 150, 0.5, 0.4)]
    draws = []
    for _ in range(4000):
        picked = [rng.integers(0, len(p.base), len(p.base)) for p in pairs]
        base = sum(p.base[i].mean() for p, i in zip(pairs, picked, strict=True))
        draws.append(sum(p.linearized[i].mean() for p, i in zip(pairs, picked, strict=True)) / base)
    found = recovery(pairs)
    assert found is not None
    assert found.se == pytest.approx(np.std(draws), rel=0.06)
    assert found.value == pytest.approx(np.mean(draws), abs=0.01)


@pytest.mark.parametrize("above_chance", [False, True])
def test_the_error_is_that_of_other_documents(above_chance: bool) -> None:
    """Over fresh samples, estimates scatter by the standard error that each states."""
    rng = np.random.default_rng(1)
    found = [recovery([answers(rng, 300, 0.8, 0.15)], above_chance) for _ in range(1500)]
    values, errors = np.array([(f.value, f.se) for f in found if f]).T
    assert len(values) == 1500
    assert errors.mean() == pytest.approx(values.std(), rel=0.07)


def test_pairing_makes_the_error_smaller() -> None:
    rng = np.random.default_rng(2)
    pair = answers(rng, 500, 0.6, 0.1)
    shuffled = Paired.of(pair.base, rng.permutation(pair.linearized), pair.chance)
    paired, unpaired = recovery([pair]), recovery([shuffled])
    assert paired and unpaired and paired.value == pytest.approx(unpaired.value)
    assert paired.se < 0.5 * unpaired.se
    assert pair.difference.se < 0.5 * shuffled.difference.se


def test_every_task_counts_once() -> None:
    large = Paired.of([1.0] * 100, [1.0] * 100, [0] * 100)
    small = Paired.of([1.0] * 4, [1.0, 0, 1, 0], [0] * 4)
    found = recovery([large, small])
    assert found is not None and found.value == 0.75


def test_above_chance_says_more_than_the_plain_ratio() -> None:
    """A model that guesses has lost everything, and a plain ratio says half."""
    rng = np.random.default_rng(3)
    base = np.ones(2000)
    pair = Paired.of(base, (rng.random(2000) < 0.5).astype(float), np.full(2000, 0.5))
    plain, above = recovery([pair]), recovery([pair], above_chance=True)
    assert plain and above
    assert plain.value == pytest.approx(0.5, abs=0.04) and above.value == pytest.approx(0, abs=0.07)


def test_nothing_to_divide_by() -> None:
    nothing = Paired.of([0, 0, 0], [1, 0, 0], [0, 0, 0])
    assert recovery([nothing]) is None and recovery([]) is None and not nothing.clear
    alone = Paired.of([1], [0], [0.5])
    assert mean(alone.base).se == 0 and recovery([alone]) is not None


def test_other_documents_are_no_pair() -> None:
    for base, linearized in (([1, 0], [1]), ([], [])):
        with pytest.raises(ValueError, match="different documents"):
            Paired.of(base, linearized, base)
