"""Real graphs as TensorRT networks, counted a second time from the ONNX file; and what is refused."""

from __future__ import annotations

import re
from collections import Counter as Count
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from nbl_export.engine.build import Network, check_graph, check_network
from nbl_export.engine.elsewhere import parsable
from nbl_export.engine.library import Library
from nbl_export.engine.manifest import Limits, NetworkFacts, NetworkTensor, limits, profiles
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import QUANTIZED, precision_of
from tests.finished import Graphs

LENGTH = 64
NAMES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT64: "INT64",
}
FLOATS = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}


def tensors(values: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → dtype and shape (-1: dynamic) of a graph's inputs or outputs, from the ONNX file."""
    found = {}
    for value in values:
        dims = value.type.tensor_type.shape.dim
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        found[value.name] = (NAMES[value.type.tensor_type.elem_type], shape)
    return found


@pytest.mark.parametrize(
    ("precision", "form", "layers"),
    [("fp32", "concat", ()), ("bf16", "static", (0, 3)), ("fp16", "static", range(5))],
)
def test_a_network_is_what_the_graph_is(
    rtx: Library, engine_graphs: Graphs, precision: str, form: str, layers: Sequence[int]
) -> None:
    with parsable(engine_graphs(form, precision, layers), LENGTH) as path:
        facts = Network(rtx, path).facts
        proto = onnx.load(str(path))
    ops = Count(node.op_type for node in proto.graph.node)
    kept = 5 - len(layers)
    assert facts.attention == ops["Attention"] == kept
    assert facts.kv_cache_updates == ops["TensorScatter"] == (2 * kept if form == "static" else 0)
    assert facts.layers > sum(ops[op] for op in ("MatMul", "Attention", "Add", "Mul"))
    constants = {tensor.name for tensor in proto.graph.initializer}  # an input with a default is none here
    given = [value for value in proto.graph.input if value.name not in constants]
    assert {t.name: (t.dtype, t.shape) for t in facts.inputs} == tensors(given)
    outputs = {t.name: (t.dtype, len(t.shape)) for t in facts.outputs}
    assert outputs == {n: (dtype, len(shape)) for n, (dtype, shape) in tensors(proto.graph.output).items()}
    stored = Count()
    for tensor in proto.graph.initializer:
        stored[NAMES.get(tensor.data_type, "other")] += onnx.numpy_helper.to_array(tensor).nbytes
    for name in FLOATS.values():
        # Epsilons and scales are the parser's own.
        assert stored[name] <= facts.weight_bytes.get(name, 0) <= stored[name] + 1024
    check_network(facts, precision_of(precision), kept, form == "static", stored["FLOAT"])
    with pytest.raises(BuildError, match=f"{kept} attention layers, expected {kept + 1}"):
        check_network(facts, precision_of(precision), kept + 1, form == "static", stored["FLOAT"])


# operators ---------------------------------------------------------------------------------------


def foreign(path: Path, *nodes: tuple[str, str]) -> ir.Model:
    """A graph of one Relu and ``nodes``, each a domain and an operator."""
    helper = onnx.helper
    made = [helper.make_node("Relu", ["x"], ["y0"])]
    for i, (domain, op) in enumerate(nodes):
        made.append(helper.make_node(op, [f"y{i}"], [f"y{i + 1}"], domain=domain))
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 4]) for n in ("x", f"y{len(nodes)}")]
    graph = helper.make_graph(made, "decoder", [ends[0]], [ends[1]])
    opsets = [helper.make_opsetid(d, 1) for d in {d for d, _ in nodes if d}]
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), *opsets]), str(path))
    return load_graph(path)


def test_operators_of_onnxruntime_are_named_with_the_way_around(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = foreign(
        path, *[("com.microsoft", "GroupQueryAttention")] * 3, ("com.microsoft", "RotaryEmbedding")
    )
    with pytest.raises(InputError) as caught:
        check_graph(model, precision_of("fp32"), path)
    message = str(caught.value)
    for words in (str(path), "com.microsoft.GroupQueryAttention", "3 nodes", "1 more", "nbl-export export"):
        assert words in message
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_weights_are_refused(name: str, tmp_path: Path) -> None:
    model = foreign(tmp_path / "graph.onnx")
    with pytest.raises(
        InputError, match=rf"^graph\.onnx has {name} weights, .*: export it in fp32, fp16, bf16\.$"
    ):
        check_graph(model, QUANTIZED[name], Path("graph.onnx"))
    check_graph(model, precision_of("bf16"), Path("graph.onnx"))


# check_network -----------------------------------------------------------------------------------


def tensor(name: str, dtype: str = "HALF") -> NetworkTensor:
    return NetworkTensor(name, dtype, (-1, 4, 64, 8))


def facts(dtype: str = "HALF") -> NetworkFacts:
    """A static network of two attention layers in half, whose graph keeps 1,000 bytes in float32."""
    past = [tensor(f"past_key_values.{i}.{s}", dtype) for i in range(2) for s in ("key", "value")]
    present = [tensor(f"present.{i}.{s}", dtype) for i in range(2) for s in ("key", "value")]
    integers = [tensor(n, "INT64") for n in ("input_ids", "position_ids", "write_indices")]
    weights = Count({dtype: 1_000_000}) + Count({"FLOAT": 1_000, "INT64": 500_000})
    return NetworkFacts(99, 2, 4, (*integers, *past), (tensor("logits", "FLOAT"), *present), dict(weights))


def check(found: NetworkFacts, precision: str = "fp16", static: bool = True) -> None:
    check_network(found, precision_of(precision), 2, static, 1_000)


def swapped(values: tuple[NetworkTensor, ...], name: str, dtype: str) -> tuple[NetworkTensor, ...]:
    changed = tuple(replace(t, dtype=dtype) if t.name == name else t for t in values)
    assert changed != values
    return changed


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"attention": 3}, "3 attention layers, expected 2"),
        ({"kv_cache_updates": 3}, "3 KV cache updates, expected 4"),
    ],
)
def test_wrong_counts_are_refused(counts: dict[str, int], words: str) -> None:
    with pytest.raises(BuildError, match=words):
        check(replace(facts(), **counts))


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_cache_that_was_not_removed_is_refused(side: str) -> None:
    name = {"inputs": "past_key_values.2.key", "outputs": "present.2.key"}[side]
    more = replace(facts(), **{side: (*getattr(facts(), side), tensor(name))})
    with pytest.raises(BuildError, match=f"5 KV {side}, expected 4"):
        check(more)


@pytest.mark.parametrize(
    ("side", "name", "dtype", "expected"),
    [
        ("inputs", "past_key_values.1.value", "FLOAT", "HALF"),
        ("outputs", "present.1.key", "FLOAT", "HALF"),
        ("outputs", "logits", "HALF", "FLOAT"),
        ("inputs", "input_ids", "INT32", "INT64"),
    ],
)
def test_a_wrong_dtype_is_refused_by_name(side: str, name: str, dtype: str, expected: str) -> None:
    found = replace(facts(), **{side: swapped(getattr(facts(), side), name, dtype)})
    with pytest.raises(BuildError, match=rf"{re.escape(name)}\b.* {dtype}, expected {expected}\.$"):
        check(found)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_network_of_float32_weights_is_refused(precision: str) -> None:
    """As one that a builder took back to float32, or of a conversion that did nothing."""
    dtype = FLOATS[precision]
    found = replace(facts(dtype), weight_bytes={dtype: 900_000, "FLOAT": 101_000, "INT64": 500_000})
    with pytest.raises(BuildError, match=rf"101,000 of 1,501,000 bytes .* not {dtype}; .* keeps 1,000\.$"):
        check(found, precision)


# Limits and profiles ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "model", "expected"),
    [
        ((4, None, None), None, (4, 512, 2048)),
        ((4, None, None), 1024, (4, 512, 1024)),
        ((4, None, None), 256, (4, 256, 256)),
        ((1, 17, 4096), 4096, (1, 17, 4096)),
        ((1, 1, 2), 2, (1, 1, 2)),
        ((1, None, 513), 512, "--max-context is 513; the model has 512 positions"),
        ((1, 200, 100), None, r"--max-seq is 200, more than --max-context \(100\)"),
        ((0, None, None), None, "--max-batch is 0; it must be at least 1"),
        ((1, 0, None), None, "--max-seq is 0; it must be at least 1"),
        ((1, None, 1), None, "--max-context is 1; it must be at least 2"),
    ],
)
def test_what_is_not_asked_for_goes_as_far_as_the_model(
    asked: tuple[int, int | None, int | None], model: int | None, expected: Any
) -> None:
    if isinstance(expected, tuple):
        assert limits(*asked, model) == Limits(*expected)
        return
    with pytest.raises(InputError, match=expected):
        limits(*asked, model)


B, S, PAST, TOTAL, MAX = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
    "max_sequence_length",
)


def test_profiles_are_of_a_prefill_and_a_step() -> None:
    inputs: dict[str, list[int | str]] = {
        "ids": [B, S],
        "mask": [B, TOTAL],
        "sum": [f"{PAST} + {S}"],
        "key": [B, 2, PAST, 8],
        "buffer": [MAX],
    }
    prefill, decode = profiles(inputs, Limits(max_batch=4, max_seq=10, max_context=64))
    total = ((1,), (10,), (64,))
    assert prefill.shapes == {
        "ids": ((1, 1), (1, 10), (4, 10)),
        "mask": tuple((b, *t) for b, t in zip((1, 1, 4), total, strict=True)),
        "sum": total,
        "key": ((1, 2, 0, 8), (1, 2, 0, 8), (4, 2, 54, 8)),
        "buffer": ((64,),) * 3,
    }
    assert decode.shapes == {
        "ids": ((1, 1), (1, 1), (4, 1)),
        "mask": ((1, 2), (1, 33), (4, 64)),
        "sum": ((2,), (33,), (64,)),
        "key": ((1, 2, 1, 8), (1, 2, 32, 8), (4, 2, 63, 8)),
        "buffer": ((64,),) * 3,
    }
    with pytest.raises(BuildError, match="ids has the dimension 'n'"):
        profiles({"ids": ["n"]}, Limits(1, 1, 2))
