"""Functions of layers with a state, against transformers' own: any length at once, after any state, padded anywhere."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.export.recurrence import (
    GraphStates,
    delta_rule,
    real_tokens,
    rows_of,
    selective_scan,
    state_space,
)
from nbl_export.models.dummy_run import StateShape

ROWS, TOKENS, HEADS, KEY, VALUE = 2, 37, 4, 6, 5
WHOLE = torch.ones(ROWS, TOKENS, dtype=torch.long)


def own(file: str, name: str) -> Any:
    """A function of a model file of transformers."""
    return getattr(importlib.import_module(f"transformers.models.{file}.modeling_{file}"), name)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def of_state_space(tokens: slice = slice(None)) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": random(ROWS, TOKENS, HEADS, VALUE, seed=1)[:, tokens],
        "dt": random(ROWS, TOKENS, HEADS, seed=2)[:, tokens],
        "A": -torch.exp(random(HEADS, seed=3)),
        "B": random(ROWS, TOKENS, 2, KEY, seed=4)[:, tokens],
        "C": random(ROWS, TOKENS, 2, KEY, seed=5)[:, tokens],
        "D": random(HEADS, seed=6),
        "dt_bias": random(HEADS, seed=7),
    }


def of_delta_rule(tokens: slice = slice(None), by_value: bool = False) -> dict[str, torch.Tensor]:
    heads = HEADS if by_value else 2
    decay = (ROWS, TOKENS, HEADS, KEY) if by_value else (ROWS, TOKENS, HEADS)
    return {
        "query": random(ROWS, TOKENS, heads, KEY, seed=1)[:, tokens],
        "key": random(ROWS, TOKENS, heads, KEY, seed=2)[:, tokens],
        "value": random(ROWS, TOKENS, HEADS, VALUE, seed=3)[:, tokens],
        "g": -torch.exp(random(*decay, seed=4))[:, tokens],
        "beta": torch.sigmoid(random(ROWS, TOKENS, HEADS, seed=5))[:, tokens],
    }


def close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("started", [False, True])
def test_a_state_space_model_of_any_length_after_any_state(started: bool) -> None:
    state = random(ROWS, HEADS, VALUE, KEY, seed=9) if started else None
    options = {"dt_softplus": True, "initial_states": state, "return_final_states": True}
    with rows_of(WHOLE, WHOLE):
        found = state_space(**of_state_space(), **options)
    # Chunks of 8 tokens: the text has five of them, the last one not full.
    close(found, own("mamba2", "mamba2_chunk_scan")(**of_state_space(), chunk_size=8, **options))


@pytest.mark.parametrize(
    ("file", "name", "by_value"),
    [
        ("qwen3_next", "torch_chunk_gated_delta_rule", False),
        ("kimi_linear", "chunk_kimi_delta_attention", True),
    ],
)
@pytest.mark.parametrize("started", [False, True])
def test_a_delta_rule_of_any_length_after_any_state(
    file: str, name: str, by_value: bool, started: bool
) -> None:
    state = random(ROWS, HEADS, KEY, VALUE, seed=9) if started else None
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    with rows_of(WHOLE, WHOLE):
        found = delta_rule(**of_delta_rule(by_value=by_value), **options)
    close(found, own(file, name)(**of_delta_rule(by_value=by_value), chunk_size=8, **options))


def test_a_selective_scan_takes_the_state_that_its_convolution_came_from() -> None:
    """transformers' function begins with zeros; the state of a first half is found in the cache layer."""
    given = {
        "hidden_states": random(ROWS, VALUE, TOKENS, seed=1),
        "dt": random(ROWS, VALUE, TOKENS, seed=2),
        "B": random(ROWS, KEY, TOKENS, seed=4),
        "C": random(ROWS, KEY, TOKENS, seed=5),
        "z": random(ROWS, VALUE, TOKENS, seed=8),
    }
    fixed = {
        "A": -torch.exp(random(VALUE, KEY, seed=3)),
        "D": random(VALUE, seed=6),
        "delta_bias": random(VALUE, seed=7),
        "delta_softplus": True,
        "return_last_state": True,
    }
    expected, last = own("jamba", "mamba_selective_scan")(**given, **fixed)
    shapes = [StateShape("conv", (VALUE, 3)), StateShape("recurrent", (VALUE, KEY))]
    layer = GraphStates(shapes, [torch.zeros(ROWS, *s.shape) for s in shapes], fresh=False)
    for part in (slice(0, 11), slice(11, TOKENS)):
        tokens = WHOLE[:, part]
        with rows_of(tokens, tokens):
            layer.update_conv_state(given["hidden_states"][..., part])
            found, state = selective_scan(**{name: t[..., part] for name, t in given.items()}, **fixed)
        layer.update_recurrent_state(state)
        close([found], [expected[..., part]])
    close([state], [last])


@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_no_state(left: bool) -> None:
    """A row of 9 tokens, padded to 14 on either side, ends in the state of the row by itself."""
    mask = torch.zeros(ROWS, 14, dtype=torch.long)
    mask[:, slice(5, None) if left else slice(0, 9)] = 1
    shapes = [StateShape("conv", (3, 4))]
    before, seen = random(ROWS, 3, 4, seed=1), random(ROWS, 3, 14, seed=2)
    real = slice(5, None) if left else slice(0, 9)

    def after(tokens: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer = GraphStates(shapes, [before], fresh=False)
        with rows_of(tokens, tokens):
            layer.update_conv_state(seen[..., columns])
            _, matrix = state_space(**of_state_space(columns), return_final_states=True)
            _, learned = delta_rule(**of_delta_rule(columns), output_final_state=True)
        return layer.conv_states[0], matrix, learned

    within = slice(0, 14)
    close(after(mask, within), after(mask[:, real], slice(*real.indices(14))))


def test_a_single_token_is_never_padding() -> None:
    """A growing cache padded on the right: the new token of a shorter row is not under the mask's last column."""
    ids = torch.ones(2, 1, dtype=torch.long)
    with rows_of(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), ids):
        assert real_tokens().tolist() == [[1], [1]]
    with rows_of(torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), torch.ones(2, 2, dtype=torch.long)):
        assert real_tokens().tolist() == [[1, 1], [1, 0]]
