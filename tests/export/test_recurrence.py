"""A recurrence by tokens or by chunks is the recurrence, and transformers' own, wherever a text is cut or padded."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from nbl_export.export.recurrence import (
    CHUNKED,
    RECURRENCE,
    SYMBOLIC_DOMAIN,
    GraphStates,
    delta_rule,
    real_tokens,
    rows_of,
    selective_scan,
    state_space,
)
from nbl_export.export.scans import CHUNK, make_scans
from nbl_export.models.dummy_run import StateShape

ROWS, TOKENS, HEADS, KEY, VALUE = 2, 5, 3, 4, 6
SHAPES = {
    "state": (ROWS, HEADS, KEY, VALUE),
    "decay": (ROWS, TOKENS, HEADS, KEY, 1),
    "query": (ROWS, TOKENS, HEADS, 1, KEY),
    "key": (ROWS, TOKENS, HEADS, KEY, 1),
    "value": (ROWS, TOKENS, HEADS, 1, VALUE),
    "beta": (ROWS, TOKENS, HEADS, 1, 1),
}


def one_node(operator: str, ranks: dict[str, int], delta: bool) -> ir.Model:
    """A graph that is one recurrence of these inputs, for any length, as a Scan."""
    names = list(ranks)[: None if delta else -1]
    inputs = [
        ir.Value(name=n, shape=ir.Shape([None] * ranks[n]), type=ir.TensorType(ir.DataType.FLOAT))
        for n in names
    ]
    node = ir.node(operator, inputs, domain=SYMBOLIC_DOMAIN, num_outputs=2, name="mix")
    for output, name in zip(node.outputs, ("y", "after"), strict=True):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    made = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 23}, name="test")
    model = ir.Model(made, ir_version=10)
    make_scans(model)
    return model


@pytest.mark.parametrize("delta", [False, True])
def test_a_scan_is_the_recurrence(delta: bool) -> None:
    names = list(SHAPES)[: None if delta else -1]
    random = np.random.default_rng(0)
    feeds = {name: random.uniform(0.1, 1.0, SHAPES[name]).astype(np.float32) for name in names}
    model = one_node(RECURRENCE, {name: len(shape) for name, shape in SHAPES.items()}, delta)
    assert [(n.op_type, n.domain, n.name) for n in model.graph] == [("Scan", "", "mix")]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    found, after = session.run(["y", "after"], feeds)
    state = feeds["state"].astype(np.float64)
    for token in range(TOKENS):
        decay, query, key, value = (
            feeds[n][:, token].astype(np.float64) for n in ("decay", "query", "key", "value")
        )
        state = state * decay
        if delta:
            value = (value - key.swapaxes(-1, -2) @ state) * feeds["beta"][:, token]
        state = state + key * value
        np.testing.assert_allclose(found[:, token], query @ state, rtol=1e-5)
    np.testing.assert_allclose(after, state, rtol=1e-5)


ROWS, HEADS, KEY, VALUE = 2, 3, 16, 12
RANKS = {"state": 4, "decay": 3, "query": 4, "key": 4, "value": 4, "beta": 3}
Feeds = dict[str, NDArray[Any]]


@cache
def session(delta: bool) -> Any:
    model = one_node(CHUNKED, RANKS, delta)
    assert not [n for n in model.graph if n.domain] and [n.op_type for n in model.graph].count("Scan") == 1
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())


def feeds(delta: bool, tokens: int, decay: float = 0.3, alike: bool = False) -> Feeds:
    random = np.random.default_rng(tokens)
    key = random.normal(size=(ROWS, tokens, HEADS, KEY))
    if alike:  # then what is solved for a delta rule is as far from the identity as it gets
        key = random.normal(size=(1, 1, HEADS, KEY)) + 0.05 * key
    made = {
        "state": random.normal(size=(ROWS, HEADS, KEY, VALUE)),
        "decay": -decay * np.exp(2 * random.normal(size=(ROWS, tokens, HEADS))),
        "query": random.normal(size=(ROWS, tokens, HEADS, KEY)),
        "key": key / np.linalg.norm(key, axis=-1, keepdims=True),
        "value": random.normal(size=(ROWS, tokens, HEADS, VALUE)),
        "beta": random.uniform(0.7, 1.0, (ROWS, tokens, HEADS)),
    }
    return {name: array.astype(np.float32) for name, array in made.items() if delta or name != "beta"}


def token_by_token(fed: Feeds) -> tuple[NDArray[Any], NDArray[Any]]:
    wide = {name: array.astype(np.float64) for name, array in fed.items()}
    state, found = wide["state"], []
    for token in range(wide["value"].shape[1]):
        query, key, value = (wide[name][:, token] for name in ("query", "key", "value"))
        state = state * np.exp(wide["decay"][:, token])[..., None, None]
        if "beta" in wide:
            value = (value - np.einsum("bhk,bhkv->bhv", key, state)) * wide["beta"][:, token][..., None]
        state = state + key[..., None] * value[..., None, :]
        found.append(np.einsum("bhk,bhkv->bhv", query, state))
    return np.stack(found, axis=1), state


def assert_close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and np.abs(a - b).max() < 2e-6 * np.abs(b).max()


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("decay", [1e-3, 0.3, 20.0], ids=["slow", "usual", "to zero"])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7])
@pytest.mark.parametrize("delta", [False, True])
def test_chunks_are_the_recurrence(delta: bool, tokens: int, decay: float, alike: bool) -> None:
    fed = feeds(delta, tokens, decay, alike)
    assert_close(session(delta).run(["y", "after"], fed), token_by_token(fed))


@pytest.mark.parametrize("delta", [False, True])
def test_tokens_that_change_nothing_change_nothing(delta: bool) -> None:
    """As padding is given: without a decay, and without a value or what is learned of it."""
    fed = feeds(delta, CHUNK + 9)
    padding = slice(CHUNK - 2, None)
    fed["decay"][:, padding] = 0
    fed["beta" if delta else "value"][:, padding] = 0
    (after,) = session(delta).run(["after"], fed)
    short = {n: a if n == "state" else a[:, : CHUNK - 2] for n, a in fed.items()}
    assert_close([after], session(delta).run(["after"], short))


# against transformers' own -----------------------------------------------------------------------

OWN_ROWS, OWN_TOKENS, OWN_HEADS, OWN_KEY, OWN_VALUE = 2, 37, 4, 6, 5
WHOLE = torch.ones(OWN_ROWS, OWN_TOKENS, dtype=torch.long)


def own(file: str, name: str) -> Any:
    """A function of a model file of transformers."""
    return getattr(importlib.import_module(f"transformers.models.{file}.modeling_{file}"), name)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def of_state_space(tokens: slice = slice(None)) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": random(OWN_ROWS, OWN_TOKENS, OWN_HEADS, OWN_VALUE, seed=1)[:, tokens],
        "dt": random(OWN_ROWS, OWN_TOKENS, OWN_HEADS, seed=2)[:, tokens],
        "A": -torch.exp(random(OWN_HEADS, seed=3)),
        "B": random(OWN_ROWS, OWN_TOKENS, 2, OWN_KEY, seed=4)[:, tokens],
        "C": random(OWN_ROWS, OWN_TOKENS, 2, OWN_KEY, seed=5)[:, tokens],
        "D": random(OWN_HEADS, seed=6),
        "dt_bias": random(OWN_HEADS, seed=7),
    }


def of_delta_rule(tokens: slice = slice(None), by_value: bool = False) -> dict[str, torch.Tensor]:
    heads = OWN_HEADS if by_value else 2
    decay = (OWN_ROWS, OWN_TOKENS, OWN_HEADS, OWN_KEY) if by_value else (OWN_ROWS, OWN_TOKENS, OWN_HEADS)
    return {
        "query": random(OWN_ROWS, OWN_TOKENS, heads, OWN_KEY, seed=1)[:, tokens],
        "key": random(OWN_ROWS, OWN_TOKENS, heads, OWN_KEY, seed=2)[:, tokens],
        "value": random(OWN_ROWS, OWN_TOKENS, OWN_HEADS, OWN_VALUE, seed=3)[:, tokens],
        "g": -torch.exp(random(*decay, seed=4))[:, tokens],
        "beta": torch.sigmoid(random(OWN_ROWS, OWN_TOKENS, OWN_HEADS, seed=5))[:, tokens],
    }


def close(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("started", [False, True])
def test_a_state_space_model_of_any_length_after_any_state(started: bool) -> None:
    state = random(OWN_ROWS, OWN_HEADS, OWN_VALUE, OWN_KEY, seed=9) if started else None
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
    state = random(OWN_ROWS, OWN_HEADS, OWN_KEY, OWN_VALUE, seed=9) if started else None
    options = {"initial_state": state, "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    with rows_of(WHOLE, WHOLE):
        found = delta_rule(**of_delta_rule(by_value=by_value), **options)
    close(found, own(file, name)(**of_delta_rule(by_value=by_value), chunk_size=8, **options))


def test_a_selective_scan_takes_the_state_that_its_convolution_came_from() -> None:
    """transformers' function begins with zeros; the state of a first half is found in the cache layer."""
    given = {
        "hidden_states": random(OWN_ROWS, OWN_VALUE, OWN_TOKENS, seed=1),
        "dt": random(OWN_ROWS, OWN_VALUE, OWN_TOKENS, seed=2),
        "B": random(OWN_ROWS, OWN_KEY, OWN_TOKENS, seed=4),
        "C": random(OWN_ROWS, OWN_KEY, OWN_TOKENS, seed=5),
        "z": random(OWN_ROWS, OWN_VALUE, OWN_TOKENS, seed=8),
    }
    fixed = {
        "A": -torch.exp(random(OWN_VALUE, OWN_KEY, seed=3)),
        "D": random(OWN_VALUE, seed=6),
        "delta_bias": random(OWN_VALUE, seed=7),
        "delta_softplus": True,
        "return_last_state": True,
    }
    expected, last = own("jamba", "mamba_selective_scan")(**given, **fixed)
    shapes = [StateShape("conv", (OWN_VALUE, 3)), StateShape("recurrent", (OWN_VALUE, OWN_KEY))]
    layer = GraphStates(shapes, [torch.zeros(OWN_ROWS, *s.shape) for s in shapes], past_length=0)
    for part in (slice(0, 11), slice(11, OWN_TOKENS)):
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
    mask = torch.zeros(OWN_ROWS, 14, dtype=torch.long)
    mask[:, slice(5, None) if left else slice(0, 9)] = 1
    shapes = [StateShape("conv", (3, 4))]
    before, seen = random(OWN_ROWS, 3, 4, seed=1), random(OWN_ROWS, 3, 14, seed=2)
    real = slice(5, None) if left else slice(0, 9)

    def after(tokens: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layer = GraphStates(shapes, [before], past_length=0)
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
