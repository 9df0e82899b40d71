"""A recurrence as a Scan over tokens or over chunks is the recurrence, wherever a text is cut."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from nbl_export.export.recurrence import CHUNKED, RECURRENCE, SYMBOLIC_DOMAIN
from nbl_export.export.scans import CHUNK, make_scans

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
