"""What a graph file says of itself, counted a second time with onnx alone, and without its weights."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from nbl_export.errors import InputError
from nbl_export.graph.facts import facts_of
from nbl_export.graph.summary import Stored
from nbl_export.linearize.plan import load_plan
from nbl_export.records import from_json, to_json
from tests.folders import copied


def test_facts_are_what_onnx_counts(stories_out: Path) -> None:
    path = stories_out / "model.onnx"
    proto, facts = onnx.load(str(path)), facts_of(path)
    names = {
        onnx.TensorProto.FLOAT: "float32",
        onnx.TensorProto.INT64: "int64",
        onnx.TensorProto.BOOL: "bool",
    }
    counts = Counter(names[t.data_type] for t in proto.graph.initializer)
    sizes: Counter[str] = Counter()
    for tensor in proto.graph.initializer:
        sizes[names[tensor.data_type]] += onnx.numpy_helper.to_array(tensor).nbytes
    assert facts.initializers == {name: Stored(counts[name], sizes[name]) for name in counts}
    assert facts.opsets == {"ai.onnx": proto.opset_import[0].version}
    own = [i.name for i in proto.graph.input if not i.name.startswith("past")]
    assert [i.partition(":")[0] for i in facts.inputs] == own
    assert facts.outputs == ("logits: float32[batch_size, num_logits, 512]",)
    assert facts.cache == "float32[batch_size, 4, past_sequence_length, 8]"
    assert facts.summary.nodes == len(proto.graph.node)


def test_linear_layers_are_those_of_the_plan(stories_out: Path) -> None:
    facts, before = (facts_of(stories_out / name) for name in ("model.onnx", "baseline/model.onnx"))
    assert facts.linear == load_plan(stories_out / "nbl" / "plan.json").chosen and len(facts.linear) == 2
    assert before.linear == () and before.kv_layers == (0, 1, 2, 3, 4)
    assert set(facts.kv_layers) == set(before.kv_layers) - set(facts.linear)


def test_no_weight_is_read(stories_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a weight was read")

    for name in ("numpy", "tobytes", "_load"):
        assert hasattr(ir.ExternalTensor, name)
        monkeypatch.setattr(ir.ExternalTensor, name, refuse)
    assert facts_of(stories_out / "model.onnx").summary.parameters > 200_000


def test_they_come_back_from_json(stories_out: Path) -> None:
    facts = facts_of(stories_out / "model.onnx")
    assert from_json(type(facts), to_json(facts), "facts", "again") == facts


def saved(path: Path, *shape: object) -> Path:
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, shape) for n in "xy")
    if not shape:
        x.type.tensor_type.ClearField("shape")
    text = onnx.helper.make_tensor("t", onnx.TensorProto.STRING, [2], [b"ab", b"c"])
    graph = onnx.helper.make_graph([node], "g", [x], [y], [text])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), str(path))
    return path


def test_a_graph_that_is_no_decoder(tmp_path: Path) -> None:
    facts = facts_of(saved(tmp_path / "g.onnx", 2, None, "n"))
    assert facts.inputs == ("x: float64[2, ?, n]",) and facts.cache == "none"
    assert facts.initializers == {"string": Stored(1, 3)}
    assert (facts.kv_layers, facts.linear) == ((), ())
    assert facts_of(saved(tmp_path / "h.onnx")).inputs == ("x: float64[?]",)


def test_metadata_of_somebody_else_is_refused_with_the_file(stories_out: Path, tmp_path: Path) -> None:
    path = copied(stories_out / "baseline" / "model.onnx", tmp_path)
    proto = onnx.load(str(path), load_external_data=False)
    proto.metadata_props.add(key="nbl_export.layers", value="no list")
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError) as told:
        facts_of(path)
    assert str(told.value).startswith(f"{path}: The graph's metadata nbl_export.layers")


def test_missing_data_is_refused(stories_out: Path, tmp_path: Path) -> None:
    path = copied(stories_out / "baseline" / "model.onnx", tmp_path)
    path.with_name("model.onnx.data").unlink()
    with pytest.raises(InputError, match="is missing"):
        facts_of(path)
