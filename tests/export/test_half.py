"""An export in half precision: interface and weights in it, float16 decided on real rows, no leftovers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from nbl_export.errors import BuildError
from nbl_export.export import half as half_module
from nbl_export.export.forms import FORMS
from nbl_export.export.ranges import ranges_of, save_in_precision
from nbl_export.export.torch import trace
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import PRECISIONS
from nbl_export.runtime.ort import OrtDecoder
from tests.fixtures_graph import load, pad_left, ragged_rows
from tests.graph.parsed import casts, interface_types, parsed, weight_types
from tests.listening import Notes

LAYERS, VOCAB = 4, 260
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
HALF = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


@pytest.fixture(scope="module", params=["concat", "static"])
def full(request: pytest.FixtureRequest, tiny_graph: Path, static_graph: Path) -> Path:
    """The tiny Llama in float32."""
    return tiny_graph if request.param == "concat" else static_graph


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def exported(request: pytest.FixtureRequest, full: Path, tmp_path_factory: Any) -> Any:
    """Precision, the nodes kept, and the tiny Llama in that precision, read with onnx."""
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    rows = ragged_rows((40, 21), VOCAB) if request.param == "fp16" else []
    notes = Notes()
    files, kept = save_in_precision(load_graph(full), path, PRECISIONS[request.param], rows, listener=notes)
    measured = ["Measuring ranges"] if request.param == "fp16" else []
    assert [title for title, *_ in notes.tasks] == [*measured, "Writing the graph"]
    assert sum(notes.advanced) == sum(total for _, total, *_ in notes.tasks)
    assert files == [path, path.with_name("model.onnx.data")] == sorted(path.parent.iterdir())
    onnx.checker.check_model(str(path), full_check=True)
    return request.param, kept, onnx.load(str(path))


def test_interface_is_half_but_for_logits(exported: Any, full: Path) -> None:
    name, _, proto = exported
    before = interface_types(onnx.load(str(full), load_external_data=False))
    expected = {n: HALF[name] if n.startswith(("past", "present")) else t for n, t in before.items()}
    assert list(interface_types(proto).items()) == list(expected.items())
    assert list(expected.values()).count(HALF[name]) == 4 * LAYERS
    assert (expected.pop("logits"), expected["input_ids"], expected["position_ids"]) == (FLOAT, INT64, INT64)
    assert FLOAT not in expected.values()


def test_weights_are_half_and_rounded_to_nearest(exported: Any, full: Path) -> None:
    name, _, proto = exported
    half = {t.name: t for t in proto.graph.initializer}
    before = onnx.load(str(full))
    assert set(half) == {t.name for t in before.graph.initializer}
    floats = [t for t in before.graph.initializer if t.data_type == FLOAT]
    stayed = [t.name for t in floats if half[t.name].data_type == FLOAT]
    # The rotary frequencies, which only the angle reads.
    assert len(stayed) == 1 and [n.op_type for n in proto.graph.node if stayed[0] in n.input] == ["Mul"]
    for tensor in floats:
        if tensor.name not in stayed:
            assert half[tensor.name].data_type == HALF[name]
            exact, found = (
                torch.tensor(onnx.numpy_helper.to_array(t).astype(np.float32))
                for t in (tensor, half[tensor.name])
            )
            rounded = exact.to(torch.float16 if name == "fp16" else torch.bfloat16).float()
            assert torch.equal(found, rounded), tensor.name


def test_only_the_angles_stay_float32(exported: Any, full: Path) -> None:
    _, kept, proto = exported
    assert sorted(k.op for k in kept) == ["Cast", "Cos", "Mul", "Sin"]
    assert {k.node for k in kept} <= {n.name for n in proto.graph.node}
    before = Counter(n.op_type for n in onnx.load(str(full), load_external_data=False).graph.node)
    after = Counter(n.op_type for n in proto.graph.node)
    # Cosines and sines down once for all layers, logits up.
    assert after - before == {"Cast": 3} and before - after == {}
    assert set(casts(proto).values()) == {1}
    last = next(n for n in proto.graph.node if "logits" in n.output)
    assert last.op_type == "Cast" and casts(proto)[last.input[0], FLOAT] == 1


def test_what_norms_maps_and_attention_read_is_half(exported: Any) -> None:
    name, _, proto = exported
    graph = proto.graph
    types = {
        v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)
    } | weight_types(proto)
    checked = 0
    for node in graph.node:
        if node.op_type in ("RMSNormalization", "Attention", "MatMul", "RotaryEmbedding", "TensorScatter"):
            read = {types[n] for n in node.input if n} - {INT64, onnx.TensorProto.BOOL}
            assert read == {HALF[name]}, node.name
            checked += 1
    assert checked >= 2 * LAYERS + 1 + LAYERS + 7 * LAYERS + 1 + 2 * LAYERS
    # The means of the norms are float32: stash_type, which is 1 where it is not written.
    stash = [a.i for n in graph.node if n.op_type == "RMSNormalization" for a in n.attribute]
    assert onnx.TensorProto.FLOAT16 not in stash and onnx.TensorProto.BFLOAT16 not in stash


# float16 on rows ---------------------------------------------------------------------------------

DECODER = """decoder (int64[b,s] input_ids) => (float[b,s,4] logits) {
    e = Gather(table, input_ids)
    h = MatMul(e, map)
    r = Relu(h)
    logits = MatMul(r, head)
}"""


def decoder() -> Any:
    """Token 5's embedding is 200; its h is 8 · 200 · 20 = 32,000. Every other token's is a 200th of that."""
    table = np.ones((10, 8), np.float32)
    table[5] = 200
    weights = {"table": table, "map": np.full((8, 4), 20), "head": np.eye(4) / 1000}
    return parsed(DECODER, **{n: w.astype(np.float32) for n, w in weights.items()})


@pytest.mark.parametrize(("token", "wide"), [(5, True), (4, False)])
@pytest.mark.parametrize("where", [(0, 0), (1, 2)], ids=str)
def test_the_rows_decide_what_stays_float32(
    tmp_path: Path, token: int, wide: bool, where: tuple[int, int]
) -> None:
    rows = [np.array([1, 2, 3, 1], np.int32), np.array([7, 8, 9], np.int32)]
    rows[where[0]][where[1]] = token
    _, kept = save_in_precision(decoder(), tmp_path / "model.onnx", PRECISIONS["fp16"], rows)
    assert [k.op for k in kept] == ["MatMul", "Relu", "MatMul"] * wide
    assert [k.reason for k in kept][:2] == ["h reaches 3.2e+04 on real text"] * 2 * wide
    types = weight_types(onnx.load(str(tmp_path / "model.onnx")))
    other = FLOAT if wide else HALF["fp16"]
    assert types == {"table": HALF["fp16"], "map": other, "head": other}


@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_float32s_range_needs_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def fail(*_args: Any, **_more: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(half_module, "ranges_of", fail)
    files, kept = save_in_precision(decoder(), tmp_path / "new" / "model.onnx", PRECISIONS[name], [])
    assert kept == [] and files == [tmp_path / "new" / "model.onnx"]
    expected = HALF["bf16"] if name == "bf16" else FLOAT
    assert set(weight_types(onnx.load(str(files[0]))).values()) == {expected}


# leftovers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", ["ranges_of", "to_precision", "save_graph"])
def test_a_failure_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    old = {"model.onnx": b"the old graph", "model.onnx.data": b"the old data", "config.json": b"{}"}
    for name, content in old.items():
        (tmp_path / name).write_bytes(content)

    def fail(*_args: Any, **_more: Any) -> None:
        raise error

    monkeypatch.setattr(half_module, step, fail)
    with pytest.raises(type(error)):
        save_in_precision(decoder(), tmp_path / "model.onnx", PRECISIONS["fp16"], [np.array([1, 2])])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_a_graph_that_cannot_run_leaves_nothing(tmp_path: Path) -> None:
    """A token beyond the table: measuring fails inside the runtime."""
    with pytest.raises(Exception, match=r"(?i)out of|range|bounds"):
        save_in_precision(decoder(), tmp_path / "model.onnx", PRECISIONS["fp16"], [np.array([1, 99])])
    assert list(tmp_path.iterdir()) == []


def test_control_flow_leaves_nothing(tmp_path: Path) -> None:
    yes, no = "t () => (float[b,s] y) { y = Relu(x) }", "e () => (float[b,s] z) { z = Neg(x) }"
    body = f"x = Cast<to = 1>(input_ids)\n logits = If(c) <then_branch = {yes}, else_branch = {no}>"
    model = parsed(f"g (int64[b,s] input_ids) => (float[b,s] logits) {{ {body} }}", c=np.array(True))
    with pytest.raises(BuildError, match="control flow"):
        save_in_precision(model, tmp_path / "model.onnx", PRECISIONS["fp16"], [np.array([1, 2])])
    assert list(tmp_path.iterdir()) == []


# the KV cache ------------------------------------------------------------------------------------


ROWS = ragged_rows((40, 21), VOCAB)


@pytest.fixture(scope="module")
def reaches(tiny_graph: Path) -> Mapping[str, float]:
    return ranges_of(load_graph(tiny_graph), ROWS)


def scaled(folder: Path, form: str, side: str, factor: float) -> Any:
    """A float32 graph of the tiny Llama whose layer 1 has so much larger keys or values."""
    model = load(folder)
    projection = getattr(model.get_submodule("model.layers.1.self_attn"), f"{side[0]}_proj")
    with torch.no_grad():
        projection.weight.mul_(factor)
    return trace(model, FORMS[form])


@pytest.mark.parametrize(("form", "side"), [("concat", "key"), ("static", "value"), ("shared", "key")])
def test_a_cache_beyond_float16_is_refused_by_its_layer(
    tiny_folder: Path, reaches: Mapping[str, float], tmp_path: Path, form: str, side: str
) -> None:
    graph = scaled(tiny_folder, form, side, 70_000 / reaches[f"present.1.{side}"])
    with pytest.raises(BuildError) as caught:
        save_in_precision(graph, tmp_path / "model.onnx", PRECISIONS["fp16"], ROWS)
    message = str(caught.value)
    assert message.startswith(f"The {side}s of attention layer 1 (present.1.{side}) reach "), message
    assert message.endswith("use --precision bf16.") and "65,504" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("side", ["key", "value"])
def test_a_cache_that_float16_just_holds_is_finite(
    tiny_folder: Path, reaches: Mapping[str, float], tmp_path: Path, side: str
) -> None:
    target = tmp_path / "model.onnx"
    graph = scaled(tiny_folder, "concat", side, 60_000 / reaches[f"present.1.{side}"])
    save_in_precision(graph, target, PRECISIONS["fp16"], ROWS)
    ids, mask, positions = pad_left(ROWS)
    decoder = OrtDecoder(target)
    output = decoder(ids, mask, positions, decoder.empty_past(len(ids)))
    assert np.isfinite(output.logits).all()
    present = output.present[1][["key", "value"].index(side)]
    assert np.isfinite(present).all() and 59_000 < np.abs(present).max() < 61_000
