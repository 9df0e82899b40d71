"""Broken graphs and plans given to `rewrite --onnx` and `inspect`: one sentence, the exit code, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nbl_export.linearize.plan import save_plan
from tests.command_line import Done, nbl
from tests.end_to_end.random_decoder_graphs import written
from tests.end_to_end.random_decoders import Choices, random_plan, random_weights

C = Choices(layers=2, qkv_bias=True, o_bias="Add")
Change = Callable[[onnx.ModelProto], object]
make = helper.make_node


@dataclass(frozen=True)
class Place:
    """A source folder beside a plan; the target folder does not exist yet."""

    root: Path

    @property
    def graph(self) -> Path:
        return self.root / "source" / "model.onnx"

    @property
    def plan(self) -> Path:
        return self.root / "plan" / "plan.json"

    def save(self, change: Change = lambda _: None, c: Choices = C) -> Path:
        proto = written(c, random_weights(c)).proto
        change(proto)
        self.graph.write_bytes(proto.SerializeToString())
        return self.graph

    def rewrite(self) -> Done:
        return nbl("rewrite", "--onnx", self.graph, "--plan", self.plan, "--output", self.root / "target")

    def refused(self, *codes: int) -> str:
        """The sentence of `rewrite --onnx`; nothing has changed."""
        before = contents(self.root)
        sentence = refusal(self.rewrite(), *(codes or (2,)))
        assert contents(self.root) == before
        return sentence


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = Place(tmp_path)
    found.graph.parent.mkdir()
    found.plan.parent.mkdir()
    save_plan(found.plan, random_plan(C, random_weights(C), (0,), "normed"))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(done: Done, *codes: int) -> str:
    """One sentence on stderr, the last there, and the exit code."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code in codes, done
    assert len(errors) == 1 and done.err.rstrip().endswith(errors[0]), done.err
    assert "Internal error" not in done.err and "Traceback" not in done.err
    assert len(errors[0]) < 1000 and errors[0].isprintable(), errors[0]
    return errors[0]


# external data ----------------------------------------------------------------------------------


# graphs -----------------------------------------------------------------------------------------


def first_add(proto: onnx.ModelProto) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if n.op_type == "Add")


def escape_in_a_name(proto: onnx.ModelProto) -> None:
    first_add(proto).input[1] = "a\nerror: all is well\x1b[2J"


def odd_metadata(proto: onnx.ModelProto) -> None:
    proto.metadata_props.add(key="nbl_export.kv_layers", value="[0, 1")


def incomplete_cache(proto: onnx.ModelProto) -> None:
    entry = next(v for v in proto.graph.input if v.name == "past_key_values.1.value")
    for node in proto.graph.node:
        node.input[:] = ["other" if n == entry.name else n for n in node.input]
    entry.name = "other"


def custom_operator(proto: onnx.ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("evil.example", 1))
    node = first_add(proto)
    node.op_type, node.domain = "Frobnicate", "evil.example"


def fails_at_run_time(proto: onnx.ModelProto) -> None:
    """Fewer positions than the probe has tokens."""
    (tensor,) = [t for t in proto.graph.initializer if t.name == "positions"]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:3], "positions"))


def no_attention(proto: onnx.ModelProto) -> None:
    tokens = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    embed = [t for t in proto.graph.initializer if t.name == "embed"]
    node = make("Gather", ["embed", "input_ids"], ["logits"])
    proto.graph.CopyFrom(helper.make_graph([node], "g", [tokens], [logits], embed))


UNUSABLE = (
    *(odd_metadata, incomplete_cache, escape_in_a_name, custom_operator, fails_at_run_time, no_attention),
)


@pytest.mark.parametrize("change", UNUSABLE)
def test_what_is_no_decoder(place: Place, change: Change) -> None:
    place.save(change)
    place.refused(2, 4)


def test_a_merged_decoder_is_named(place: Place) -> None:
    """All layers lie in the branches of an If."""

    def merged(proto: onnx.ModelProto) -> None:
        graph = proto.graph
        branch = helper.make_graph(
            list(graph.node), "branch", [], list(graph.output), list(graph.initializer)
        )
        names = [v.name for v in graph.output]
        del graph.node[:], graph.initializer[:]
        graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
        graph.node.append(make("If", ["flag"], names, then_branch=branch, else_branch=branch))

    place.save(merged)
    assert "merged decoder" in place.refused()


# plans ------------------------------------------------------------------------------------------
