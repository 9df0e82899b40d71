"""Broken and hostile ONNX files: one sentence, the right exit code, nothing written, little time and memory.

Every file goes through the command line, in this process, as `inspect` and as `rewrite --onnx`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from nbl_export import cli
from nbl_export.cli import output
from nbl_export.errors import InputError
from nbl_export.graph.io import load_graph
from nbl_export.linearize.plan import save_plan
from tests.end_to_end.random_decoder_graphs import written
from tests.end_to_end.random_decoders import Choices, random_plan, random_weights
from tests.graph.external_data import external

SECONDS = 60
ADDRESS_SPACE = 6 << 30
C = Choices(layers=2, qkv_bias=True, o_bias="Add")
Change = Callable[[onnx.ModelProto], None]
make = helper.make_node


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@contextmanager
def limits() -> Iterator[None]:
    def late(_signal: int, _frame: Any) -> None:
        pytest.fail(f"took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Place:
    """A source folder beside a plan, and the command line; ``target`` does not exist yet."""

    root: Path
    call: Callable[..., Done]

    @property
    def source(self) -> Path:
        return self.root / "source"

    @property
    def target(self) -> Path:
        return self.root / "target"

    @property
    def plan(self) -> Path:
        return self.root / "plan" / "plan.json"

    def save(self, proto: onnx.ModelProto) -> Path:
        (self.source / "model.onnx").write_bytes(proto.SerializeToString())
        return self.source / "model.onnx"

    def rewrite(self) -> Done:
        graph = self.source / "model.onnx"
        return self.call("rewrite", "--onnx", graph, "--plan", self.plan, "--output", self.target)

    def refused(self, *codes: int, unreadable: bool = False) -> str:
        """The sentence of `rewrite --onnx`; nothing has changed. `inspect` shows the file or says one too."""
        before = contents(self.root)
        sentence = assert_refused(self.rewrite(), *(codes or (2,)))
        looked = self.call("inspect", self.source / "model.onnx")
        if unreadable or looked.code:
            assert_refused(looked, 2)
        assert contents(self.root) == before
        return sentence


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["nbl-export", *map(str, arguments)])
        monkeypatch.delenv("NBL_EXPORT_DEBUG", raising=False)
        monkeypatch.setattr(output, "ERR", Console(file=sys.stderr, highlight=False))
        with limits(), pytest.raises(SystemExit) as caught:
            cli.main()
        text = capsys.readouterr()
        return Done(int(caught.value.code or 0), text.out, text.err)

    found = Place(tmp_path, call)
    found.source.mkdir()
    found.plan.parent.mkdir()
    save_plan(found.plan, random_plan(C, random_weights(C), (0,), "normed"))
    return found


def decoder(c: Choices = C) -> onnx.ModelProto:
    return written(c, random_weights(c)).proto


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_refused(done: Done, *codes: int) -> str:
    """One sentence on stderr, the last there, and the exit code."""
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code in codes, str(done)[:2000]
    assert len(errors) == 1 and done.err.rstrip().endswith(errors[0]), done.err[:2000]
    assert "Internal error" not in done.err and "Traceback" not in done.err
    assert len(errors[0]) < 1000 and errors[0].isprintable(), errors[0][:2000]
    return errors[0]


def refuses_to_load(path: Path) -> str:
    with pytest.raises(InputError) as caught, limits():
        load_graph(path)
    return str(caught.value)


def test_the_decoder_itself_is_rewritten(place: Place) -> None:
    """Otherwise the refusals below would say nothing."""
    place.save(decoder())
    assert place.call("inspect", place.source / "model.onnx").code == 0
    done = place.rewrite()
    assert done.code == 0, done


# external data that leaves the folder ------------------------------------------------------------


def value(name: str, size: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [size])


def in_initializer(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    proto.graph.initializer.append(tensor)


def in_branch(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    out = make("Identity", [tensor.name], ["inner"])
    branch = helper.make_graph([out], "branch", [], [value("inner", 4)], [tensor])
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    proto.graph.node.append(make("If", ["flag"], ["unused"], then_branch=branch, else_branch=branch))


def in_constant(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    proto.graph.node.append(make("Constant", [], ["unused"], value=tensor))


def in_function(proto: onnx.ModelProto, tensor: onnx.TensorProto) -> None:
    opsets = [helper.make_opsetid("", 23)]
    body = [make("Constant", [], ["y"], value=tensor)]
    proto.functions.append(helper.make_function("local", "Secret", [], ["y"], body, opsets))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    proto.graph.node.append(make("Secret", [], ["unused"], domain="local"))


PLACES = {f.__name__: f for f in (in_initializer, in_branch, in_constant, in_function)}
OUTSIDE = {
    "parent": "../secret.bin",
    "absolute": "{folder}/../secret.bin",
    "below and up": "sub/../../secret.bin",
    "link": "link.bin",
    "linked folder": "linked/secret.bin",
    "device": "/dev/zero",
    "NUL": "secret.bin\0.data",
    "too long": "x" * 5000,
    "the folder": ".",
    "no name": "",
}


@pytest.mark.parametrize("where", OUTSIDE)
@pytest.mark.parametrize("home", PLACES)
def test_external_data_outside_the_folder(place: Place, home: str, where: str) -> None:
    (place.root / "secret.bin").write_bytes(bytes(64))
    (place.source / "sub").mkdir()
    (place.source / "link.bin").symlink_to(place.root / "secret.bin")
    (place.source / "linked").symlink_to(place.root)
    location = OUTSIDE[where].replace("{folder}", str(place.source))
    proto = decoder()
    PLACES[home](proto, external("secret", TensorProto.FLOAT, [4], (location, 0, 16)))
    place.save(proto)
    sentence = place.refused(unreadable=True)
    assert any(words in sentence for words in ("outside its folder", "an invalid file name", "missing"))


RANGES: dict[str, dict[str, str]] = {
    "offset negative": {"offset": "-1"},
    "offset behind the end": {"offset": "64"},
    "offset of 63 bits": {"offset": str(2**63 - 1)},
    "offset of 70 bits": {"offset": str(2**70)},
    "offset no number": {"offset": "0x10"},
    "length negative": {"length": "-16"},
    "length beyond the end": {"length": "128"},
    "length of 64 bits": {"length": str(2**64 + 16)},
    "length no number": {"length": "sixteen"},
    "length too short": {"length": "15"},
}


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("home", PLACES)
def test_external_ranges(place: Place, home: str, name: str) -> None:
    (place.source / "own.bin").write_bytes(bytes(64))
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, text in {"location": "own.bin", "offset": "0", "length": "16", **RANGES[name]}.items():
        tensor.external_data.add(key=key, value=text)
    proto = decoder()
    PLACES[home](proto, tensor)
    place.save(proto)
    place.refused(unreadable=True)


SHAPES: dict[str, Sequence[int]] = {
    "negative": [-4],
    "two negatives": [-2, -2],
    "2^62": [2**62],
    "product overflows to 0": [2**32, 2**32],
    "product overflows to 4": [2**62 + 1, 4],
    "many": [2**31] * 40,
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("home", PLACES)
def test_absurd_shapes_of_external_data(place: Place, home: str, name: str) -> None:
    (place.source / "own.bin").write_bytes(bytes(64))
    proto = decoder()
    PLACES[home](proto, external("w", TensorProto.FLOAT, SHAPES[name], ("own.bin", 0, 16)))
    place.save(proto)
    place.refused(unreadable=True)


@pytest.mark.parametrize("name", SHAPES)
def test_absurd_shapes_of_weights(place: Place, name: str) -> None:
    proto = decoder()
    (tensor,) = [t for t in proto.graph.initializer if t.name == "1.o.bias"]
    tensor.ClearField("dims")
    tensor.dims.extend(SHAPES[name])
    place.save(proto)
    place.refused(2, 4)


def test_absurd_shapes_take_no_memory(tmp_path: Path) -> None:
    """In a process of its own whose address space ends at some gigabytes."""
    place = Place(tmp_path, lambda: None)  # type: ignore[arg-type,return-value]
    place.source.mkdir()
    proto = decoder()
    for number, dims in enumerate(([2**40], [2**20, 2**20], [2**62])):
        proto.graph.initializer.append(
            TensorProto(name=f"w{number}", data_type=TensorProto.FLOAT, dims=dims, raw_data=bytes(16))
        )
        proto.graph.node.append(make("Identity", [f"w{number}"], [f"unused{number}"]))
    path = place.save(proto)
    code = (
        "import resource, sys; "
        f"resource.setrlimit(resource.RLIMIT_AS, ({ADDRESS_SPACE}, {ADDRESS_SPACE})); "
        "from nbl_export.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "inspect", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 2) and "Internal error" not in done.stderr, done.stderr[-2000:]


# graphs that are none ----------------------------------------------------------------------------


def cycle(proto: onnx.ModelProto) -> None:
    first = proto.graph.node[0]
    proto.graph.node.append(make("Identity", [proto.graph.node[-1].output[0]], ["loop"]))
    first.input[0] = "loop"


def self_cycle(proto: onnx.ModelProto) -> None:
    node = next(n for n in proto.graph.node if n.op_type == "Add")
    node.input[0] = node.output[0]


def written_twice(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(make("Identity", ["logits"], [proto.graph.node[3].output[0]]))


def input_written(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(make("Identity", ["logits"], ["input_ids"]))


def undefined(proto: onnx.ModelProto) -> None:
    next(n for n in proto.graph.node if n.op_type == "Add").input[1] = "nowhere"


def undefined_in_a_branch(proto: onnx.ModelProto) -> None:
    out = make("Identity", ["nowhere"], ["inner"])
    branch = helper.make_graph([out], "branch", [], [value("inner", 4)])
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    proto.graph.node.append(make("If", ["flag"], ["unused"], then_branch=branch, else_branch=branch))


def undefined_output(proto: onnx.ModelProto) -> None:
    proto.graph.output.append(value("nowhere", 4))


def no_nodes(proto: onnx.ModelProto) -> None:
    del proto.graph.node[:]


def no_outputs(proto: onnx.ModelProto) -> None:
    del proto.graph.output[:]


def no_inputs(proto: onnx.ModelProto) -> None:
    del proto.graph.input[:]


def untyped_inputs(proto: onnx.ModelProto) -> None:
    for entry in proto.graph.input:
        entry.ClearField("type")


def unknown_type(proto: onnx.ModelProto) -> None:
    for entry in proto.graph.input:
        entry.type.tensor_type.elem_type = 77


def unknown_tensor_type(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].data_type = 77


def string_cache(proto: onnx.ModelProto) -> None:
    for entry in past(proto):
        entry.type.tensor_type.elem_type = TensorProto.STRING


def odd_metadata(proto: onnx.ModelProto) -> None:
    proto.metadata_props.add(key="nbl_export.kv_layers", value="[0, 1")


def odd_rewritten(proto: onnx.ModelProto) -> None:
    proto.metadata_props.add(key="nbl_export.layers", value="no list")


def incomplete_cache(proto: onnx.ModelProto) -> None:
    entry = next(v for v in proto.graph.input if v.name == "past_key_values.1.value")
    for node in proto.graph.node:
        node.input[:] = ["other" if n == entry.name else n for n in node.input]
    entry.name = "other"


def incomplete_present(proto: onnx.ModelProto) -> None:
    entry = next(v for v in proto.graph.output if v.name == "present.0.key")
    proto.graph.output.remove(entry)


def newline_in_a_name(proto: onnx.ModelProto) -> None:
    next(n for n in proto.graph.node if n.op_type == "Add").input[1] = "a\nerror: all is well\x1b[2J"


def huge_name(proto: onnx.ModelProto) -> None:
    next(n for n in proto.graph.node if n.op_type == "Add").input[1] = "x" * (20 << 20)


def sequence_cache(proto: onnx.ModelProto) -> None:
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    for entry in past(proto):
        entry.type.CopyFrom(helper.make_sequence_type_proto(element))


def cache_of_rank_2(proto: onnx.ModelProto) -> None:
    for entry in past(proto):
        del entry.type.tensor_type.shape.dim[2:]


def negative_heads(proto: onnx.ModelProto) -> None:
    for entry in past(proto):
        entry.type.tensor_type.shape.dim[1].dim_value = -(2**62)


def past(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [v for v in proto.graph.input if v.name.startswith("past")]


def rename_values(proto: onnx.ModelProto, old: Sequence[str], new: Sequence[str]) -> None:
    """Replace the beginnings ``old`` of tensors' names."""

    def renamed(name: str) -> str:
        for a, b in zip(old, new, strict=True):
            name = b + name[len(a) :] if name.startswith(a) else name
        return name

    for entry in (*proto.graph.input, *proto.graph.output):
        entry.name = renamed(entry.name)
    for node in proto.graph.node:
        node.input[:] = [renamed(n) for n in node.input]
        node.output[:] = [renamed(n) for n in node.output]


def huge_number(proto: onnx.ModelProto) -> None:
    number = "9" * 5000
    rename_values(
        proto, ("past_key_values.1.", "present.1."), (f"past_key_values.{number}.", f"present.{number}.")
    )


def extra_input(proto: onnx.ModelProto) -> None:
    proto.graph.input.append(value("encoder_states", 4))
    proto.graph.node.append(make("Identity", ["encoder_states"], ["unused"]))


def no_opset(proto: onnx.ModelProto) -> None:
    del proto.opset_import[:]


def future_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 999


def future_version(proto: onnx.ModelProto) -> None:
    proto.ir_version = 9999


def first_of(proto: onnx.ModelProto, kind: str) -> onnx.NodeProto:
    return next(n for n in proto.graph.node if n.op_type == kind)


def unimported_operator(proto: onnx.ModelProto) -> None:
    node = first_of(proto, "Relu")
    node.op_type, node.domain = "Frobnicate", "evil.example"


def custom_operator(proto: onnx.ModelProto) -> None:
    unimported_operator(proto)
    proto.opset_import.append(helper.make_opsetid("evil.example", 1))


def recursive_function(proto: onnx.ModelProto) -> None:
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("local", 1)]
    body = [make("Again", ["x"], ["y"], domain="local")]
    proto.functions.append(helper.make_function("local", "Again", ["x"], ["y"], body, opsets))
    proto.opset_import.append(helper.make_opsetid("local", 1))
    node = first_of(proto, "Relu")
    node.op_type, node.domain = "Again", "local"


def giant_at_run_time(proto: onnx.ModelProto) -> None:
    """Four terabytes of zeros, summed and added."""
    proto.graph.initializer.append(numpy_helper.from_array(np.array([2**40]), "size"))
    add = first_of(proto, "Add")
    read, add.input[0] = add.input[0], "more"
    place = list(proto.graph.node).index(add)
    proto.graph.node.insert(place, make("Add", [read, "sum"], ["more"]))
    proto.graph.node.insert(place, make("ReduceSum", ["zeros"], ["sum"], keepdims=0))
    proto.graph.node.insert(place, make("ConstantOfShape", ["size"], ["zeros"]))


def fails_at_run_time(proto: onnx.ModelProto) -> None:
    """Fewer positions than the probe has tokens."""
    (tensor,) = [t for t in proto.graph.initializer if t.name == "positions"]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:3], "positions"))


def no_attention(proto: onnx.ModelProto) -> None:
    entry = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"])
    proto.graph.CopyFrom(
        helper.make_graph(
            [make("Gather", ["embed", "input_ids"], ["logits"])],
            "g",
            [entry],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
            [t for t in proto.graph.initializer if t.name == "embed"],
        )
    )


def other_names(proto: onnx.ModelProto) -> None:
    """Tokens that are not called so."""
    for entry in proto.graph.input:
        entry.name = "tokens" if entry.name == "input_ids" else entry.name
    for node in proto.graph.node:
        node.input[:] = ["tokens" if n == "input_ids" else n for n in node.input]


UNREADABLE: dict[str, Change] = {
    f.__name__: f
    for f in (
        cycle,
        self_cycle,
        written_twice,
        input_written,
        undefined,
        undefined_in_a_branch,
        undefined_output,
        no_nodes,
        no_inputs,
        unknown_type,
        unknown_tensor_type,
        newline_in_a_name,
        huge_name,
    )
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_graph(place: Place, name: str) -> None:
    proto = decoder()
    UNREADABLE[name](proto)
    sentence = refuses_to_load(place.save(proto))
    assert str(place.source / "model.onnx") in sentence
    place.refused(unreadable=True)


UNUSABLE: dict[str, Change] = {
    f.__name__: f
    for f in (
        no_outputs,
        untyped_inputs,
        string_cache,
        sequence_cache,
        cache_of_rank_2,
        negative_heads,
        odd_metadata,
        odd_rewritten,
        incomplete_cache,
        incomplete_present,
        huge_number,
        extra_input,
        no_opset,
        future_opset,
        future_version,
        custom_operator,
        unimported_operator,
        recursive_function,
        giant_at_run_time,
        fails_at_run_time,
        no_attention,
    )
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_no_decoder(place: Place, name: str) -> None:
    proto = decoder()
    UNUSABLE[name](proto)
    place.save(proto)
    place.refused(2, 4)


def test_names_of_its_own_are_seen_by_what_reads_them(place: Place) -> None:
    proto = decoder()
    other_names(proto)
    place.save(proto)
    assert place.rewrite().code == 0


def test_a_dead_operator_of_nobody_is_no_obstacle(place: Place) -> None:
    proto = decoder()
    proto.opset_import.append(helper.make_opsetid("evil.example", 1))
    proto.graph.node.append(make("Frobnicate", ["logits"], ["unused"], domain="evil.example"))
    place.save(proto)
    assert place.rewrite().code == 0


def test_caches_numbered_by_the_layers_of_a_hybrid_model(place: Place) -> None:
    """Where only some layers are attention, exporters may number the caches 3, 7, 11 …"""
    proto = decoder()
    rename_values(proto, ("past_key_values.1.", "present.1."), ("past_key_values.7.", "present.7."))
    place.save(proto)
    place.refused(2, 4)


@pytest.mark.parametrize("attribute", ["bits", "block_size", "K"])
def test_attributes_of_the_wrong_type(place: Place, attribute: str) -> None:
    proto = decoder(replace(C, linear="MatMulNBits"))
    for node in [n for n in proto.graph.node if n.op_type == "MatMulNBits"]:
        kept = [a for a in node.attribute if a.name != attribute]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(attribute, "four")])
    place.save(proto)
    place.refused(2, 4)


@pytest.mark.parametrize("cache", ["none", "usual"])
def test_a_merged_decoder_is_named(place: Place, cache: str) -> None:
    """All layers lie in the branches of an If."""
    proto = decoder(replace(C, cache=cache))
    graph = proto.graph
    branch = helper.make_graph(list(graph.node), "branch", [], list(graph.output), list(graph.initializer))
    names = [v.name for v in graph.output]
    del graph.node[:], graph.initializer[:]
    graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    graph.node.append(make("If", ["flag"], names, then_branch=branch, else_branch=branch))
    place.save(proto)
    assert "merged decoder" in place.refused()


def test_files_that_are_no_onnx(place: Place) -> None:
    path = place.save(decoder())
    whole = path.read_bytes()
    for content in (
        whole[:-7],
        whole[: len(whole) // 2],
        whole[1:],
        b"PK\3\4" + bytes(5000),
        b"\xff" * 5000,
        b"",
    ):
        path.write_bytes(content)
        place.refused(unreadable=True)


# rewritten before, and plans of others -----------------------------------------------------------


def test_a_rewritten_graph_is_refused_again(place: Place) -> None:
    place.save(decoder())
    assert place.rewrite().code == 0
    again = replace(place, root=place.root / "again")
    again.root.mkdir()
    (place.root / "target").rename(again.source)
    (place.root / "plan").rename(again.root / "plan")
    assert "already rewritten" in again.refused()
    assert again.call("inspect", again.source / "model.onnx").code == 0
    before = contents(again.root)
    graph = again.source / "model.onnx"
    done = again.call("rewrite", "--onnx", graph, "--plan", again.plan, "--in-place")
    assert done.code == 0 and "done already, kept" in done.err  # the very same rewrite
    assert contents(again.root) == before


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"width": 12}, 4, "Layer 0 is not proven"),
        ({"layers": 3}, 2, "has 2 attention layers, the plan is for 3"),
        ({"layers": 1}, 2, "has 2 attention layers, the plan is for 1"),
        ({"seed": 5}, 4, "Layer 0 is not proven"),
    ],
    ids=str,
)
def test_a_plan_of_another_model(place: Place, changes: dict[str, int], code: int, words: str) -> None:
    c = replace(C, **changes)  # type: ignore[arg-type]
    save_plan(place.plan, random_plan(c, random_weights(c), (0,), "normed"))
    place.save(decoder())
    assert words in place.refused(code)


def edit_header(plan: Path, **fields: Any) -> None:
    plan.write_text(json.dumps({**json.loads(plan.read_text()), **fields}))


def edit_numbers(plan: Path) -> None:
    numbers = plan.with_suffix(".safetensors")
    raw = bytearray(numbers.read_bytes())
    raw[-1] ^= 1
    numbers.write_bytes(raw)


PLANS: dict[str, Callable[[Path], object]] = {
    "another width": lambda p: edit_header(p, hidden_size=9),
    "another layer": lambda p: edit_header(p, layers=[1]),
    "another fit": lambda p: edit_header(p, fit_input="residual"),
    "no hash": lambda p: edit_header(p, sha256=None),
    "no numbers": lambda p: p.with_suffix(".safetensors").unlink(),
    "cut numbers": lambda p: p.with_suffix(".safetensors").write_bytes(b"\xff" * 9),
    "one bit": edit_numbers,
    "no JSON": lambda p: p.write_text("{"),
    "a list": lambda p: p.write_text("[]"),
    "missing": lambda p: p.unlink(),
}


@pytest.mark.parametrize("name", PLANS)
def test_damaged_plans(place: Place, name: str) -> None:
    place.save(decoder())
    PLANS[name](place.plan)
    sentence = place.refused()
    assert "nbl-export select" in sentence and str(place.plan.parent) in sentence


# large and deep ----------------------------------------------------------------------------------


def put_first(proto: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    rest = [onnx.NodeProto.FromString(n.SerializeToString()) for n in proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *rest])


def chain(start: str, length: int, kind: str = "Identity", twice: bool = False) -> list[onnx.NodeProto]:
    """start ─► node ─► node ─► …; ``twice``: each reads the one before two times."""
    names = [start, *(f"{start} {i}" for i in range(length))]
    return [make(kind, [a, a] if twice else [a], [b], name=b) for a, b in pairwise(names)]


def read_instead(proto: onnx.ModelProto, old: str, new: str) -> None:
    for node in proto.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def behind_a_weight(proto: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    read_instead(proto, nodes[0].input[0], nodes[-1].output[0])
    put_first(proto, nodes)


def many_constants(proto: onnx.ModelProto) -> None:
    behind_a_weight(proto, chain("1.o", 99_000))


def doubled_constants(proto: onnx.ModelProto) -> None:
    behind_a_weight(proto, chain("1.o", 40, "Max", twice=True))


def many_views_of_the_past(proto: onnx.ModelProto) -> None:
    behind_a_weight(proto, chain("past_key_values.0.key", 5_000))


def many_views_of_an_unnamed_past(proto: onnx.ModelProto) -> None:
    rename_values(proto, ("past_key_values", "present"), ("old", "new"))
    behind_a_weight(proto, chain("old.0.key", 5_000))


def many_activations(proto: onnx.ModelProto) -> None:
    first = next(n for n in proto.graph.node if n.op_type == "Add")
    name, first.output[0] = first.output[0], "h"
    nodes = chain("h", 5_000, "Abs")
    read_instead(proto, name, nodes[-1].output[0])
    place = list(proto.graph.node).index(first) + 1
    rest = [onnx.NodeProto.FromString(n.SerializeToString()) for n in proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend([*rest[:place], *nodes, *rest[place:]])


def many_dead_nodes(proto: onnx.ModelProto) -> None:
    proto.graph.node.extend(chain("logits", 20_000))


def nested_branches(proto: onnx.ModelProto) -> None:
    """As deep as protobuf reads."""
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    value_of = helper.make_tensor_value_info
    inner: onnx.GraphProto | None = None
    for depth in range(20):
        other = helper.make_graph(
            [make("Identity", ["logits"], [f"e{depth}"])], "e", [], [value_of(f"e{depth}", 1, None)]
        )
        node = make("If", ["flag"], [f"o{depth}"], then_branch=inner or other, else_branch=other)
        inner = helper.make_graph([node], f"b{depth}", [], [value_of(f"o{depth}", 1, None)])
    proto.graph.node.append(make("If", ["flag"], ["unused"], then_branch=inner, else_branch=inner))


LARGE: dict[str, Change] = {
    f.__name__: f
    for f in (
        many_constants,
        doubled_constants,
        many_views_of_the_past,
        many_views_of_an_unnamed_past,
        many_activations,
        many_dead_nodes,
        nested_branches,
    )
}


@pytest.mark.parametrize("name", LARGE)
def test_large_graphs_are_shown_in_seconds(place: Place, name: str) -> None:
    """And rewritten, or refused in a sentence; a chain of 100,000 nodes passes no recursion limit."""
    proto = decoder()
    LARGE[name](proto)
    path = place.save(proto)
    looked = place.call("inspect", path)
    assert looked.code == 0, looked.err
    if name == "many_constants":  # onnxruntime takes its time for these
        return
    before = contents(place.source)
    done = place.rewrite()
    if done.code:
        assert_refused(done, 2, 4)
    assert contents(place.source) == before


@pytest.mark.parametrize("cache", ["usual", "none"])
def test_deep_decoders(place: Place, cache: str) -> None:
    """80 layers are what large models have."""
    c = Choices(layers=80, cache=cache)
    save_plan(place.plan, random_plan(c, random_weights(c), (3, 70), "normed"))
    place.save(decoder(c))
    done = place.rewrite()
    assert done.code == 0, done.err


def test_wide_nodes_before_a_product(place: Place) -> None:
    c = replace(C, cache="none")
    proto = decoder(c)
    first = next(n for n in proto.graph.node if n.op_type == "Add").output[0]
    names = [first, *(f"w{i}" for i in range(8))]
    for a, b in pairwise(names):
        proto.graph.node.append(make("Max", [a] * 20, [b], name=b))
    proto.graph.node.append(make("MatMul", [names[-1], first], ["unused"]))
    assert place.call("inspect", place.save(proto)).code == 0
