"""A recurrence in a graph: onnxruntime's Scan against a loop over tokens in NumPy."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from nbl_export.export.recurrence import RECURRENCE, SYMBOLIC_DOMAIN
from nbl_export.export.scans import make_scans

ROWS, TOKENS, HEADS, KEY, VALUE = 2, 5, 3, 4, 6
SHAPES = {
    "state": (ROWS, HEADS, KEY, VALUE),
    "decay": (ROWS, TOKENS, HEADS, KEY, 1),
    "query": (ROWS, TOKENS, HEADS, 1, KEY),
    "key": (ROWS, TOKENS, HEADS, KEY, 1),
    "value": (ROWS, TOKENS, HEADS, 1, VALUE),
    "beta": (ROWS, TOKENS, HEADS, 1, 1),
}


def graph(names: list[str]) -> ir.Model:
    """A graph that is one recurrence of these inputs."""

    def value(name: str) -> ir.Value:
        shape = ["rows", *("tokens" if d == TOKENS else d for d in SHAPES[name][1:])]
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    inputs = [value(name) for name in names]
    node = ir.node(RECURRENCE, inputs, domain=SYMBOLIC_DOMAIN, num_outputs=2, name="mix")
    for output, name in zip(node.outputs, ("y", "after"), strict=True):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    made = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 23}, name="test")
    return ir.Model(made, ir_version=10)


@pytest.mark.parametrize("delta", [False, True])
def test_a_scan_is_the_recurrence(delta: bool) -> None:
    names = list(SHAPES)[: None if delta else -1]
    random = np.random.default_rng(0)
    feeds = {name: random.uniform(0.1, 1.0, SHAPES[name]).astype(np.float32) for name in names}
    model = graph(names)
    make_scans(model)
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
