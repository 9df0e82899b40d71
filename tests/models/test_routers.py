"""Routers of PyTorch: their choices are kept, and they choose what they are told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nbl_export.models.routers import Routers

REAL = np.array([[False, True], [True, True]])
SCORES = torch.tensor([[9.0, 8.0, 7.0], [1.0, 3.0, 2.0], [6.0, 4.0, 5.0], [1.0, 2.0, 2.5]])


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3)])
def test_choices_of_real_tokens_are_kept(shape: tuple[int, ...]) -> None:
    routers = Routers([REAL, REAL])
    with routers:
        SCORES.topk(2)  # before any pass
        routers.begin()
        values, places = torch.topk(SCORES.reshape(shape), 2, dim=-1)
        torch.topk(SCORES, 2, dim=0)  # over tokens: none of a router
        routers.begin()
        SCORES.reshape(shape).topk(1)
    assert values.shape == places.shape == (*shape[:-1], 2)
    (first, other), (last,) = routers.passes
    assert other is None and first is not None and last is not None
    assert first.own.tolist() == [[1, 2], [0, 2], [2, 1]]
    assert np.array_equal(first.scores, SCORES.numpy()[1:])
    assert routers.chosen()[1][0].tolist() == [[1], [0], [2]]  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3)])
def test_what_is_told_is_chosen_and_weighed_by_the_own_scores(shape: tuple[int, ...]) -> None:
    told = np.array([[0, 2], [0, 1], [1, 2]])
    routers = Routers([REAL], [[told]])
    with routers:
        routers.begin(0)
        found = torch.topk(SCORES.reshape(shape), 2)
        more = torch.topk(SCORES, 1)  # nothing is said of a second router
    # The first token is padding.
    assert found.indices.reshape(4, 2).tolist() == [[0, 1], [0, 2], [0, 1], [1, 2]]
    assert found.values.reshape(4, 2).tolist() == [[9, 8], [1, 2], [6, 4], [2, 2.5]]
    assert more.indices.tolist() == [[0], [1], [0], [2]]
    choice = routers.passes[0][0]
    assert choice is not None and choice.own.tolist() == [[1, 2], [0, 2], [2, 1]]


def test_outside_the_block_nothing_is_changed() -> None:
    routers = Routers([REAL], [[np.array([[0], [0], [0]])]])
    routers.begin()
    assert torch.topk(SCORES, 1).indices.tolist() == [[0], [1], [0], [2]]
    assert routers.passes == [[]]
