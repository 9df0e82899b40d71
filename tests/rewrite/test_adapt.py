"""Weights of a graph are changed where they are, once each, in its precision and orientation."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.errors import BuildError
from nbl_export.rewrite.adapt import merge_adapters
from tests.linearize.made import adapter_for

RNG = np.random.default_rng(0)
WEIGHT, OTHER = (RNG.normal(size=(6, 4)).astype(np.float32) for _ in range(2))
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def graph(**weights: Any) -> ir.Model:
    """A graph with ``weights`` as initializers, and one more of their shape in a Constant node."""
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in weights.items()]
    constant = ir.node("Constant", [], {"value": ir.tensor(OTHER, name="other")})
    made = ir.Graph([], constant.outputs, nodes=[constant], initializers=values, opset_imports={"": 23})
    return ir.Model(made, ir_version=10)


def weight_of(model: ir.Model, name: str) -> Any:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("turned", [False, True])
def test_a_weight_is_changed_in_its_own_dtype_and_orientation(dtype: Any, turned: bool) -> None:
    adapter = adapter_for(WEIGHT)
    stored = np.ascontiguousarray((WEIGHT.T if turned else WEIGHT).astype(dtype))
    untouched = OTHER.T.astype(dtype).copy() if turned else OTHER.astype(dtype)
    model = graph(w=stored, near=untouched)
    merge_adapters(model, {"mlp.weight": adapter})
    change = adapter.up.astype(np.float64) @ adapter.down
    expected = stored.astype(np.float64) + (change.T if turned else change)
    found = weight_of(model, "w")
    assert found.dtype == np.dtype(dtype) and found.shape == stored.shape
    assert np.allclose(found.astype(np.float64), expected, rtol=1e-2 if dtype != np.float32 else 1e-6)
    assert np.array_equal(weight_of(model, "near"), untouched)


def test_a_weight_in_a_constant_node_is_found() -> None:
    model = graph()
    adapter = adapter_for(OTHER)
    merge_adapters(model, {"mlp.weight": adapter})
    (node,) = model.graph
    assert np.allclose(node.attributes["value"].as_tensor().numpy(), OTHER + adapter.up @ adapter.down)


@pytest.mark.parametrize("times", [0, 2])
def test_a_weight_that_is_not_there_once_is_refused(times: int) -> None:
    model = graph(**{f"w{i}": WEIGHT for i in range(times)}, near=WEIGHT + 1e-3)
    with pytest.raises(
        BuildError, match=rf"mlp\.weight, which the graph contains {times} times.*--repair-rank 0"
    ):
        merge_adapters(model, {"mlp.weight": adapter_for(WEIGHT)})
