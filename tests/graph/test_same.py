"""Two graphs are the same program, or the first thing that is not is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.same import difference

TEXT = """<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
g (float[n,2] x, int64[m] i) => (y, z) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {5, 6}>
{ h = MatMul(x, w)
  s = Add(h, b)
  y = Softmax <axis = 1> (s)
  c = Constant <value = float[1] {7}> ()
  p = local.double(c)
  z = Mul(h, p) }
<opset_import: ["" : 18], domain: "local">
double (a) => (o) { o = Add(a, a) }"""


def model(text: str = TEXT) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


def weight(found: ir.Model, name: str, array: np.ndarray) -> None:
    found.graph.initializers[name].const_value = ir.tensor(array, name=name)


CHANGES: dict[str, tuple[Callable[[ir.Model], object] | tuple[str, str], str]] = {
    "operator": (("h = MatMul", "h = Gemm"), "h is written by Gemm instead of MatMul"),
    "inputs": (("Add(h, b)", "Add(b, h)"), "the Add that writes s reads other tensors"),
    "attribute": (("axis = 1", "axis = 0"), "the Softmax that writes y has another axis"),
    "no attribute": ((" <axis = 1>", ""), "the Softmax that writes y has another axis"),
    "constant": (("{7}", "{8}"), "the Constant that writes c has another value"),
    "one node more": (("z = Mul", "extra = Neg(h)\n  z = Mul"), "it has another Neg that writes extra"),
    "one node less": (
        ("p = local.double(c)\n  z = Mul(h, p)", "z = Mul(h, c)"),
        "it lacks the double that writes p",
    ),
    "weight": (lambda m: weight(m, "w", np.float32([[1, 2], [3, 5]])), "its weight w is another"),
    "type": (lambda m: weight(m, "w", np.float64([[1, 2], [3, 4]])), "its weight w is another"),
    "shape": (lambda m: weight(m, "b", np.float32([[5, 6]])), "its weight b is another"),
    "weight more": ((", float[2] b", ", float[2] d = {5, 6}, float[2] b"), "it has another weight d"),
    "function": (("Add(a, a)", "Mul(a, a)"), "its function double is another"),
    "graph inputs": (("int64[m] i", "int64[m] j"), "its inputs are others"),
    "graph outputs": (("=> (y, z)", "=> (z, y)"), "its outputs are others"),
    "opset": (('["" : 18, "local"', '["" : 19, "local"'), "its opset is another"),
    "metadata": (lambda m: m.metadata_props.update(key="[2]"), "its metadata key is another"),
}


@pytest.mark.parametrize("how", CHANGES)
def test_each_change_is_named(how: str) -> None:
    change, words = CHANGES[how]
    if isinstance(change, tuple):
        assert change[0] in TEXT
        other = model(TEXT.replace(*change))
    else:
        other = model()
        change(other)
    assert difference(model(), other, ("key",)) == words


def test_names_of_nodes_their_order_and_other_metadata_do_not_count() -> None:
    constant = "c = Constant <value = float[1] {7}> ()\n  "
    other = model(TEXT.replace(constant, "").replace("h = MatMul", f"{constant}h = MatMul"))
    other.metadata_props["other"] = "1"
    for number, node in enumerate(other.graph):
        node.name, node.doc_string = f"n{number}", "text"
    assert difference(model(), other, ("key",)) == ""


def test_where_a_weight_lies_does_not_count_and_its_bytes_do(tmp_path: Path) -> None:
    wide = np.arange(4096, dtype=np.float32).reshape(64, 64)
    wide[3, 3] = np.nan
    expected = model()
    weight(expected, "w", wide)
    paths = [tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx"]
    for path in paths:
        path.parent.mkdir()
        save_graph(expected, path, lambda _path: None)
    a, b = map(load_graph, paths)
    assert isinstance(b.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert difference(a, b) == difference(expected, load_graph(paths[1])) == ""
    assert difference(load_graph(paths[0]), load_graph(paths[0])) == ""
    data = next(p for p in paths[1].parent.iterdir() if p != paths[1])
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    assert difference(load_graph(paths[0]), load_graph(paths[1])).endswith("is another")


@pytest.mark.parametrize(
    "dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8]
)
def test_a_weight_that_is_computed_may_be_off_by_the_order_of_additions(dtype: ir.DataType) -> None:
    numbers = np.random.default_rng(0).uniform(1, 2, (2, 2)).astype(np.float32)
    tensor = ir.tensor((numbers * 50).astype(dtype.numpy()), dtype=dtype, name="w")
    raw = tensor.numpy().copy()
    step = raw.view({1: np.int8, 2: np.int16, 4: np.int32}[raw.itemsize])

    def found(array: np.ndarray) -> str:
        expected, other = model(), model()
        lazy = ir.LazyTensor(lambda: tensor, dtype=dtype, shape=ir.Shape([2, 2]), name="w")
        expected.graph.initializers["w"].const_value = lazy
        other.graph.initializers["w"].const_value = ir.tensor(array, dtype=dtype, name="w")
        return difference(expected, other)

    assert found(raw) == ""
    step += 1
    assert found(raw) == ("its weight w is another" if dtype == ir.DataType.INT8 else "")
    step += 100
    assert found(raw) == "its weight w is another"
