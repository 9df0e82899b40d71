"""Broken graphs and plans given to `rewrite --onnx` and `inspect`: one sentence, the exit code, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nbl_export.linearize.plan import save_plan
from tests.command_line import Done, nbl
from tests.end_to_end.random_decoder_graphs import written
from tests.end_to_end.random_decoders import Choices, random_plan, random_weights
from tests.graph.external_data import external

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

    def unreadable(self) -> str:
        refusal(nbl("inspect", self.graph), 2)
        return self.refused()


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


def test_the_decoder_itself_is_rewritten_and_refused_a_second_time(place: Place) -> None:
    """Otherwise the refusals below would say nothing."""
    place.save()
    assert nbl("inspect", place.graph).code == 0
    assert place.rewrite().code == 0
    place.graph.unlink()
    (place.root / "target").rename(place.root / "again")
    done = nbl(
        *("rewrite", "--onnx", place.root / "again" / "model.onnx"),
        *("--plan", place.plan, "--output", place.root / "target"),
    )
    assert "already rewritten" in refusal(done, 2)


# external data ----------------------------------------------------------------------------------


def in_initializer(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    proto.graph.initializer.append(tensor)


def in_branch(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    output = helper.make_tensor_value_info("inner", TensorProto.FLOAT, [4])
    branch = helper.make_graph([make("Identity", [tensor.name], ["inner"])], "branch", [], [output], [tensor])
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    proto.graph.node.append(make("If", ["flag"], ["unused"], then_branch=branch, else_branch=branch))


def in_constant(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    proto.graph.node.append(make("Constant", [], ["unused"], value=tensor))


@pytest.mark.parametrize(
    "where", ["../secret.bin", "{folder}/../secret.bin", "link.bin", "linked/secret.bin"]
)
@pytest.mark.parametrize("home", [in_initializer, in_branch, in_constant])
def test_external_data_outside_the_folder(
    place: Place, home: Callable[[onnx.ModelProto, onnx.TensorProto], None], where: str
) -> None:
    (place.root / "secret.bin").write_bytes(bytes(64))
    (place.graph.parent / "link.bin").symlink_to(place.root / "secret.bin")
    (place.graph.parent / "linked").symlink_to(place.root)
    location = where.replace("{folder}", str(place.graph.parent))
    place.save(lambda p: home(p, external("secret", TensorProto.FLOAT, [4], (location, 0, 16))))
    place.unreadable()


@pytest.mark.parametrize(("offset", "length"), [("-1", "16"), ("64", "16"), ("0", "128"), ("0", "15")])
def test_external_ranges_outside_the_file(place: Place, offset: str, length: str) -> None:
    (place.graph.parent / "own.bin").write_bytes(bytes(64))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, text in {"location": "own.bin", "offset": offset, "length": length}.items():
        tensor.external_data.add(key=key, value=text)
    place.save(lambda p: in_initializer(p, tensor))
    place.unreadable()


# graphs -----------------------------------------------------------------------------------------


def past(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [v for v in proto.graph.input if v.name.startswith("past_key_values")]


def first_add(proto: onnx.ModelProto) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if n.op_type == "Add")


def cycle(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(make("Identity", [proto.graph.node[-1].output[0]], ["loop"]))
    proto.graph.node[0].input[0] = "loop"


def undefined(proto: onnx.ModelProto) -> None:
    first_add(proto).input[1] = "nowhere"


def escape_in_a_name(proto: onnx.ModelProto) -> None:
    first_add(proto).input[1] = "a\nerror: all is well\x1b[2J"


def no_nodes(proto: onnx.ModelProto) -> None:
    del proto.graph.node[:]


@pytest.mark.parametrize("change", [cycle, no_nodes])
def test_what_is_no_graph(place: Place, change: Change) -> None:
    assert str(place.save(change)) in place.unreadable()


def no_outputs(proto: onnx.ModelProto) -> None:
    del proto.graph.output[:]


def cache_of_rank_2(proto: onnx.ModelProto) -> None:
    for entry in past(proto):
        del entry.type.tensor_type.shape.dim[2:]


def odd_metadata(proto: onnx.ModelProto) -> None:
    proto.metadata_props.add(key="nbl_export.kv_layers", value="[0, 1")


def incomplete_cache(proto: onnx.ModelProto) -> None:
    entry = next(v for v in proto.graph.input if v.name == "past_key_values.1.value")
    for node in proto.graph.node:
        node.input[:] = ["other" if n == entry.name else n for n in node.input]
    entry.name = "other"


def future_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 999


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
    *(no_outputs, cache_of_rank_2, odd_metadata, incomplete_cache, undefined, escape_in_a_name),
    *(future_opset, custom_operator, fails_at_run_time, no_attention),
)


@pytest.mark.parametrize("change", UNUSABLE)
def test_what_is_no_decoder(place: Place, change: Change) -> None:
    place.save(change)
    place.refused(2, 4)


def test_tokens_of_another_name_are_found(place: Place) -> None:
    def renamed(proto: onnx.ModelProto) -> None:
        for entry in proto.graph.input:
            entry.name = "tokens" if entry.name == "input_ids" else entry.name
        for node in proto.graph.node:
            node.input[:] = ["tokens" if n == "input_ids" else n for n in node.input]

    place.save(renamed)
    assert place.rewrite().code == 0


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


def test_files_that_are_no_onnx(place: Place) -> None:
    whole = place.save().read_bytes()
    for content in (whole[:-7], whole[1:], b"PK\3\4" + bytes(5000), b""):
        place.graph.write_bytes(content)
        place.unreadable()


# plans ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"width": 12}, 4, "Layer 0 is not proven"),
        ({"layers": 3}, 2, "has 2 attention layers, the plan is for 3"),
        ({"seed": 5}, 4, "Layer 0 is not proven"),
    ],
    ids=str,
)
def test_a_plan_of_another_model(place: Place, changes: dict[str, int], code: int, words: str) -> None:
    c = replace(C, **changes)  # type: ignore[arg-type]
    save_plan(place.plan, random_plan(c, random_weights(c), (0,), "normed"))
    place.save()
    assert words in place.refused(code)


def edited(plan: Path) -> None:
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "layers": [1]}))


def one_bit(plan: Path) -> None:
    numbers = plan.with_suffix(".safetensors")
    raw = bytearray(numbers.read_bytes())
    raw[-1] ^= 1
    numbers.write_bytes(raw)


PLANS: dict[str, Callable[[Path], object]] = {
    "another layer": edited,
    "one bit": one_bit,
    "no numbers": lambda p: p.with_suffix(".safetensors").unlink(),
    "no JSON": lambda p: p.write_text("{"),
    "missing": lambda p: p.unlink(),
}


@pytest.mark.parametrize("name", PLANS)
def test_damaged_plans(place: Place, name: str) -> None:
    place.save()
    PLANS[name](place.plan)
    sentence = place.refused()
    assert "nbl-export select" in sentence and str(place.plan.parent) in sentence
