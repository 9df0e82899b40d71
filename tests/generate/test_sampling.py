"""Sampling: its limits are greedy, a seed is a sequence, and the shares of tokens are those of the softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from nbl_export.errors import InputError
from nbl_export.generate.sampling import Sampler

LOGITS = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32) * 3
DRAWS = 40_000


def expected(logits: Any, temperature: float, top_p: float) -> Any:
    """The probabilities that transformers samples with."""
    scores = torch.from_numpy(np.array(logits))[None].double()
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    return torch.softmax(TopPLogitsWarper(top_p)(None, scores), -1)[0].numpy()


@pytest.mark.parametrize(
    "how", [(0, 1.0), (1e-9, 1.0), (1e-300, 1.0), (5e-324, 0.5), (1.0, 1e-9), (9.0, 1e-300)]
)
def test_no_temperature_and_no_probability_is_greedy(how: tuple[float, float]) -> None:
    sampler = Sampler(*how, seed=3)
    assert [sampler(row) for row in LOGITS] == [int(row.argmax()) for row in LOGITS]


def test_of_two_that_are_equal_the_first_is_taken() -> None:
    ties = np.array([0.0, 2.0, 1.0, 2.0])
    assert {Sampler(*how)(ties) for how in ((0.0, 1.0), (1.0, 1e-9))} == {1}


def test_a_seed_is_a_sequence() -> None:
    one, same, other = ([Sampler(1.0, 0.9, seed)(LOGITS[0]) for _ in range(1)] for seed in (1, 1, 2))
    assert one == same
    one, same, other = (
        [s(row) for row in LOGITS] for s in (Sampler(1.0, 0.9, 1), Sampler(1.0, 0.9, 1), Sampler(1.0, 0.9, 2))
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (2.0, 1.0), (1.0, 0.8), (1.5, 0.5)]
)
def test_shares_are_those_that_transformers_samples_with(temperature: float, top_p: float) -> None:
    logits = LOGITS[0][:12]
    sampler, probabilities = Sampler(temperature, top_p, 0), expected(logits, temperature, top_p)
    counts = np.bincount([sampler(logits) for _ in range(DRAWS)], minlength=len(logits))
    assert set(np.flatnonzero(counts)) <= set(np.flatnonzero(probabilities))
    # Five standard deviations of each share.
    bound = 5 * np.sqrt(probabilities * (1 - probabilities) / DRAWS)
    assert np.all(np.abs(counts / DRAWS - probabilities) <= bound + 1e-12)


def test_another_temperature_has_other_shares() -> None:
    logits = LOGITS[0][:12]
    cold = [Sampler(0.5, 1.0, s)(logits) for s in range(300)]
    warm = [Sampler(3.0, 1.0, s)(logits) for s in range(300)]
    assert cold.count(int(logits.argmax())) > 2 * warm.count(int(logits.argmax()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_number_is_refused(value: float, temperature: float) -> None:
    with pytest.raises(InputError, match="logits are not finite"):
        Sampler(temperature)(np.array([0.0, value, 1.0]))


def test_tokens_that_are_ruled_out_are_not_drawn() -> None:
    logits = np.array([0.0, -np.inf, 0.0], dtype=np.float16)
    assert {Sampler(1.0, 1.0, s)(logits) for s in range(50)} == {0, 2}
