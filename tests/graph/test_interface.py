"""What a decoder graph takes and gives, by role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from nbl_export.errors import BuildError, InputError
from nbl_export.export.forms import embedding_form
from nbl_export.export.torch import save_in_precision, trace
from nbl_export.graph.cache import kv_pairs, state_pairs
from nbl_export.graph.cores import INPUTS_KEY, remember_roles, roles
from nbl_export.graph.embedding import NAME, Embedding, add_features, embedding_of, reads_embeddings
from nbl_export.graph.facts import facts_of, summarize
from nbl_export.graph.interface import interface_of
from nbl_export.graph.io import load_graph, set_folder
from nbl_export.graph.precision import precision_of
from nbl_export.graph.summary import Stored
from nbl_export.rewrite.leave_out import remove_pairs
from tests.families import Calibrated
from tests.fixtures_graph import cpu_session

MS = "com.microsoft"


def info(name: str, *shape: Any, kind: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, kind, list(shape))


def grouped(
    names: tuple[str, ...] = ("past_key_values.0.key", "past_key_values.0.value"),
    outputs: tuple[str, ...] = ("present.0.key", "present.0.value"),
    inputs: tuple[str, ...] = (),
) -> ir.Model:
    """One GroupQueryAttention of 4 heads of 16 over 2."""
    weights = {
        "w": np.zeros((8, 16 * (4 + 2 * 2)), np.float32),
        "o": np.zeros((64, 5), np.float32),
        "e": np.zeros((9, 8), np.float32),
        "lengths": np.zeros(1, np.int32),
        "total": np.int32(1),
    }
    nodes = [
        helper.make_node("Gather", ["e", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["qkv"]),
        helper.make_node(
            "GroupQueryAttention",
            ["qkv", "", "", *names, "lengths", "total"],
            ["a", *outputs],
            domain=MS,
            num_heads=4,
            kv_num_heads=2,
        ),
        helper.make_node("MatMul", ["a", "o"], ["scores"]),
    ]
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [
                info("input_ids", "b", "s", kind=TensorProto.INT64),
                *(info(name, "b", 2, "p", 16) for name in names),
                *(info(name, kind=TensorProto.INT64) for name in inputs),
            ],
            [*(info(name, "b", 2, "t", 16) for name in outputs), info("scores", "b", "s", 5)],
            [numpy_helper.from_array(v, n) for n, v in weights.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)],
        ir_version=10,
    )
    return ir.from_proto(proto)


def test_our_own_graph(tiny_graph: Path) -> None:
    found = interface_of(load_graph(tiny_graph))
    assert found.inputs >= {"input_ids", "attention_mask", "position_ids"}
    assert (found.logits, found.static, found.ragged, found.cacheless) == ("logits", False, False, False)
    assert found.layers == (0, 1, 2, 3) and {(e.heads, e.sizes) for e in found.cache} == {(2, (8, 8))}
    row = found.row(np.array([5, 6, 7]), np.float32)
    assert set(row) == found.inputs
    assert row["position_ids"].tolist() == [[0, 1, 2]] and row["attention_mask"].tolist() == [[1, 1, 1]]
    assert row["past_key_values.3.value"].shape == (1, 2, 0, 8)


def test_a_cache_of_other_names_is_seen_by_what_is_done_with_it() -> None:
    found = interface_of(grouped(("v_in", "k_in"), ("v_out", "k_out")))
    # The operator says which is the key, not the name.
    assert [(e.past, e.present) for e in found.cache] == [(("v_in", "k_in"), ("v_out", "k_out"))]
    assert found.past_names == ["v_in", "k_in"] and found.present_names == ["v_out", "k_out"]
    assert [(e.heads, e.sizes) for e in found.cache] == [(2, (16, 16))]
    assert found.ragged and found.logits == "scores"


def test_an_input_of_unknown_meaning_is_named() -> None:
    with pytest.raises(
        InputError, match=r"has an input 'input_features' that nbl-export does not know"
    ) as told:
        interface_of(grouped(inputs=("input_features",)))
    assert "\n" not in str(told.value)


def test_a_cache_that_says_nothing_of_its_heads_is_refused(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            value.shape = ir.Shape([None, None, None, None])
    with pytest.raises(
        InputError, match=r"number of heads and the head_dim of past_key_values\.0\.key are unknown"
    ):
        interface_of(model)


GRAPH = """
<ir_version: 10, opset_import: ["" : 17]>
g (int64[b, s] {tokens}, int64[b, t] {mask}, int64[b, s] {positions}) => (float[b, s, 4] y)
<float[50, 4] words = {{}}, float[9, 4] places = {{}}>
{{
  e = Gather (words, {tokens})
  {table}
  seen = Cast <to = 1> ({mask})
  total = ReduceSum <keepdims = 0> (seen)
  x = Add (e, p)
  y = Mul (x, total)
}}
"""
TABLE = "p = Gather (places, {positions})"
ROTARY = "f = Cast <to = 1> ({positions})  c = Cos (f)  one = Constant <value_ints = [2]> ()  p = Unsqueeze (c, one)"
OWN = {"tokens": "a", "mask": "b_", "positions": "c_"}
MEANING = {"input_ids": "a", "attention_mask": "b_", "position_ids": "c_"}


def graph(table: str, names: dict[str, str]) -> ir.Model:
    text = GRAPH.format(**names, table=table.format(**names))
    text = text.replace("words = {}", f"words = {{{', '.join(['0.5'] * 200)}}}")
    return ir.from_onnx_text(text.replace("places = {}", f"places = {{{', '.join(['0.5'] * 36)}}}"))


def meaning(model: ir.Model) -> dict[str, str]:
    return {name: str(value.name) for name, value in roles(model).items()}


@pytest.mark.parametrize("table", [TABLE, ROTARY])
def test_names_of_their_own_are_found_by_structure(table: str) -> None:
    assert meaning(graph(table, OWN)) == MEANING
    usual = {"tokens": "input_ids", "mask": "attention_mask", "positions": "position_ids"}
    model = graph(table, usual)
    assert meaning(model) == {name: name for name in usual.values()}
    remember_roles(model)
    assert INPUTS_KEY not in model.metadata_props


def test_what_a_rewrite_removes_is_remembered() -> None:
    model = graph(TABLE, OWN)
    remember_roles(model)
    for node in list(model.graph):
        if node.inputs and node.inputs[-1] is not None and node.inputs[-1].name == "c_":
            node.replace_input_with(1, model.graph.inputs[0])
    assert meaning(model) == MEANING
    del model.metadata_props[INPUTS_KEY]
    assert "position_ids" not in meaning(model)


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


def test_a_summary_counts_what_onnx_counts(tiny_graph: Path) -> None:
    proto = onnx.load(str(tiny_graph))
    summary = summarize(load_graph(tiny_graph), tiny_graph)
    assert summary.nodes == len(proto.graph.node) == sum(summary.ops.values())
    assert summary.ops["Attention"] == summary.kv_pairs == 4
    assert summary.ops["MatMul"] == 4 * 7 + 1  # q, k, v, o, gate, up, down, and the logits
    assert (summary.inputs, summary.outputs) == (len(proto.graph.input), len(proto.graph.output))
    assert summary.initializers == len(proto.graph.initializer)
    assert summary.parameters == sum(int(np.prod(t.dims)) for t in proto.graph.initializer)
    # Keys and values of four layers, two heads of eight float32.
    assert summary.kv_bytes_per_token == 4 * 2 * 2 * 8 * 4
    data = tiny_graph.with_name("model.onnx.data").stat().st_size
    assert summary.file_bytes == tiny_graph.stat().st_size + data
    absent = tiny_graph.with_name("elsewhere.onnx")
    assert summarize(load_graph(tiny_graph), absent).file_bytes == data
    # Of a file in another folder, what the graph reads of it.
    below = tiny_graph.parents[1] / "model.onnx"
    read = {t.name: onnx.numpy_helper.to_array(t).nbytes for t in proto.graph.initializer}
    small = sum(size for size in read.values() if size < 1024)
    assert summarize(load_graph(tiny_graph), below).file_bytes == sum(read.values()) - small


SIDES = ("key", "value")
HEADS, DIM = 3, 2
PAST, NEW, BATCH = 5, 4, 2


def cache_graph(
    layers: int,
    questions: dict[str, tuple[str, dict[str, int]]] | None = None,
    extra: list[onnx.NodeProto] | None = None,
    without: tuple[str, ...] = (),
) -> ir.Model:
    """A graph whose layer i appends the number 10 i (key) or 10 i + 1 (value) to its past.

    ``questions`` are outputs: each the Shape of a tensor with the attributes given, as float.
    """
    sides = [
        (f"{layer}.{name}", 10 * layer + side) for layer in range(layers) for side, name in enumerate(SIDES)
    ]
    asked = questions or {}
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT),
        *(
            helper.make_node(
                "Concat", [f"past_key_values.{pair}", f"new.{pair}"], [f"present.{pair}"], axis=2
            )
            for pair, _ in sides
        ),
        *(helper.make_node("Shape", [of], [f"{name}.shape"], **how) for name, (of, how) in asked.items()),
        *(helper.make_node("Cast", [f"{name}.shape"], [name], to=TensorProto.FLOAT) for name in asked),
    ]
    inputs = [
        info("input_ids", "batch", "new", kind=TensorProto.INT64),
        info("attention_mask", "batch", "total", kind=TensorProto.INT64),
        *(info(f"past_key_values.{pair}", "batch", HEADS, "past", DIM) for pair, _ in sides),
    ]
    outputs = [
        info("logits", "batch", "new"),
        *(info(f"present.{pair}", "batch", HEADS, "total", DIM) for pair, _ in sides),
        *(info(name, "n") for name in asked),
    ]
    graph_proto = helper.make_graph(
        [*nodes, *(extra or [])],
        "cache",
        [v for v in inputs if v.name not in without],
        [v for v in outputs if v.name not in without],
        [
            numpy_helper.from_array(np.full((BATCH, HEADS, 1, DIM), number, np.float32), f"new.{pair}")
            for pair, number in sides
        ],
    )
    proto = helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ir.from_proto(proto)


def run(model: ir.Model, feeds: dict[str, Any]) -> dict[str, Any]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = cpu_session(proto)
    names = [i.name for i in session.get_inputs()]
    assert set(names) <= set(feeds)
    wanted = [o.name for o in session.get_outputs()]
    return dict(zip(wanted, session.run(wanted, {n: feeds[n] for n in names}), strict=True))


def feeds(layers: int) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    past = {
        f"past_key_values.{i}.{s}": generator.standard_normal((BATCH, HEADS, PAST, DIM)).astype(np.float32)
        for i in range(layers)
        for s in SIDES
    }
    ids = np.arange(BATCH * NEW, dtype=np.int64).reshape(BATCH, NEW)
    return {"input_ids": ids, "attention_mask": np.ones((BATCH, PAST + NEW), np.int64), **past}


def test_pairs_come_by_index_with_key_before_value() -> None:
    model = cache_graph(12)
    # The order of inputs and outputs is the file's, not ours to rely on.
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    model.graph.inputs.clear()
    model.graph.inputs.extend(reversed(inputs))
    model.graph.outputs.clear()
    model.graph.outputs.extend(reversed(outputs))
    pairs = kv_pairs(model)
    assert [p.index for p in pairs] == list(range(12))
    for pair in pairs:
        assert [v.name for v in pair.past] == [f"past_key_values.{pair.index}.{s}" for s in SIDES]
        assert [v.name for v in pair.present] == [f"present.{pair.index}.{s}" for s in SIDES]


@pytest.mark.parametrize(
    "missing",
    ["past_key_values.1.key", "past_key_values.1.value", "present.1.key", "present.1.value"],
)
def test_incomplete_pairs_are_refused(missing: str) -> None:
    with pytest.raises(InputError, match="KV cache 1 is incomplete"):
        kv_pairs(cache_graph(3, without=(missing,)))


@pytest.mark.parametrize("removed", [(), (0,), (11,), (0, 3, 10), (4, 5), tuple(range(12))])
def test_the_rest_is_renumbered_in_order(removed: tuple[int, ...]) -> None:
    model = cache_graph(12)
    remove_pairs(model, removed, kv_pairs(model))
    kept = [i for i in range(12) if i not in removed]
    names = [f"past_key_values.{n}.{s}" for n in range(len(kept)) for s in SIDES]
    assert [v.name for v in model.graph.inputs] == ["input_ids", "attention_mask", *names]
    given = feeds(len(kept))
    result = run(model, given)
    assert set(result) == {"logits", *(n.replace("past_key_values", "present") for n in names)}
    # Which layer a pair is of shows in the number that it appends.
    for new, old in enumerate(kept):
        for side, name in enumerate(SIDES):
            present = result[f"present.{new}.{name}"]
            assert np.array_equal(present[:, :, :PAST], given[f"past_key_values.{new}.{name}"])
            assert np.array_equal(np.unique(present[:, :, PAST:]), [10 * old + side])


QUESTIONS = {
    "length": {"start": 2, "end": 3},
    "batch": {"start": 0, "end": 1},
    "heads": {"start": 1, "end": 2},
    "all": {},
    "from the length": {"start": 2},
    "up to the heads": {"end": 2},
    "counted from the end": {"start": -2, "end": -1},
}
ANSWERS = {
    "length": [PAST],
    "batch": [BATCH],
    "heads": [HEADS],
    "all": [BATCH, HEADS, PAST, DIM],
    "from the length": [PAST, DIM],
    "up to the heads": [BATCH, HEADS],
    "counted from the end": [PAST],
}


@pytest.mark.parametrize("removed", [(0,), (0, 1)], ids=["a twin is kept", "no cache is left"])
@pytest.mark.parametrize("side", SIDES)
def test_questions_for_the_past_length_are_answered_without_it(removed: tuple[int, ...], side: str) -> None:
    questions = {name: (f"past_key_values.0.{side}", attributes) for name, attributes in QUESTIONS.items()}
    model = cache_graph(2, questions)
    before = run(model, feeds(2))
    remove_pairs(model, removed, kv_pairs(model))
    assert [v.name for v in model.graph.inputs][2:] == [
        f"past_key_values.0.{s}" for s in SIDES if len(removed) == 1
    ]
    after = run(model, feeds(2))
    for name, expected in ANSWERS.items():
        assert before[name].tolist() == after[name].tolist() == expected, name


def test_a_past_that_is_still_read_is_an_error_naming_the_reader() -> None:
    reader = helper.make_node("Relu", ["past_key_values.1.key"], ["kept"], name="the_reader")
    model = cache_graph(2, extra=[reader])
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == "kept"))
    with pytest.raises(BuildError, match=r"past_key_values\.1\.key cannot be removed: a Relu \(the_reader\)"):
        remove_pairs(model, (1,), kv_pairs(model))


def typed(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def test_a_state_is_an_input_and_an_output_of_one_name_of_which_the_batch_alone_is_open() -> None:
    inputs = [
        typed("input_ids", "batch", "sequence"),
        typed("past.0.conv", "batch", 32, 3),
        typed("past_recurrent.0", "batch", 4, 8, 8),
        typed("past_key_values.1.key", "batch", 2, "past", 8),
        typed("past.2.conv", "batch", 32, 3),  # no output
    ]
    outputs = [
        typed("logits", "batch", "sequence", 260),
        typed("present.0.conv", "batch", 32, 3),
        typed("present_recurrent.0", "batch", 4, 8, 8),
        typed("present_key_values.1.key", "batch", 2, "total", 8),
    ]
    graph = ir.Graph(inputs, outputs, nodes=[], opset_imports={"": 23})
    found = state_pairs(ir.Model(graph, ir_version=10))
    assert [(p.past.name, p.present.name, p.shape) for p in found] == [
        ("past.0.conv", "present.0.conv", (32, 3)),
        ("past_recurrent.0", "present_recurrent.0", (4, 8, 8)),
    ]


# embedding: The embedding beside a decoder computes what PyTorch does, from rows of its table, in every precision

OFF = {"fp32": 0.0, "fp16": 1e-3, "bf16": 1e-2}


@pytest.mark.parametrize("precision", OFF)
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_it_is_the_models(
    name: str, precision: str, wrapper: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    model = wrapper(name).model
    ids = np.random.default_rng(0).integers(0, 260, (2, 7))
    graph = trace(model, embedding_form(model))
    save_in_precision(
        graph, tmp_path / NAME, precision_of(precision), [ids[0]], embedding_form(model).outputs
    )
    with torch.inference_mode():
        expected = model.get_input_embeddings()(torch.from_numpy(ids)).numpy()  # type: ignore[operator]
    (found,) = Embedding(tmp_path / NAME)(ids).values()
    assert found.dtype == np.float32
    with pytest.raises(InputError, match="has 260 tokens, and none with the id 260"):
        Embedding(tmp_path / NAME)(np.array([[3, 260]]))
    np.testing.assert_allclose(
        found, expected, rtol=OFF[precision], atol=OFF[precision] * np.abs(expected).max()
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])  # onnxruntime multiplies no bfloat16 on a CPU
@pytest.mark.parametrize(
    "tokens", [{"image": 250}, {"image": 260, "audio": 251}], ids=["in the table", "beyond it"]
)
def test_what_towers_make_is_put_in_its_places(
    tokens: dict[str, int], precision: str, wrapper: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    """The embeddings of the other tokens are scaled, these are not; too few or too many are an error."""
    model = wrapper("gemma3").model
    graph = trace(model, embedding_form(model))
    save_in_precision(
        graph, tmp_path / NAME, precision_of(precision), [np.arange(9)], embedding_form(model).outputs
    )
    files = add_features(tmp_path / NAME, tokens)
    assert {file.name for file in files} == {file.name for file in tmp_path.iterdir()}
    ids = np.random.default_rng(0).integers(0, 240, (2, 7))
    for column, token in enumerate(tokens.values()):
        ids[0, column + 1 : column + 5 : 2] = token
        ids[1, 5 - column] = token
    width = model.config.hidden_size  # type: ignore[union-attr]
    features = {f"{kind}_features": np.random.rand(3, width).astype(np.float32) for kind in tokens}
    session = ort.InferenceSession(str(tmp_path / NAME))
    found = session.run(None, {"input_ids": ids, **features})[0]

    expected = Embedding(tmp_path / NAME)(np.where(ids < 240, ids, 0))["inputs_embeds"]  # as the text is
    for token, given in zip(tokens.values(), features.values(), strict=True):
        expected[ids == token] = given
    np.testing.assert_array_equal(found, expected)
    # Text alone, as it is while tokens are generated.
    nothing = {name: array[:0] for name, array in features.items()}
    alone = session.run(None, {"input_ids": ids[:, :1], **nothing})[0]
    np.testing.assert_array_equal(alone, expected[:, :1])
    for wrong in (2, 4):
        name = next(iter(features))
        with pytest.raises(Exception, match="ScatterND"):
            session.run(None, {"input_ids": ids, **features, name: np.ones((wrong, width), np.float32)})


def decoder(folder: Path) -> ir.Model:
    """A graph that reads embeddings, in ``folder``."""
    embeds = ir.Value(name="inputs_embeds", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 2, 3]))
    node = ir.node("Identity", [embeds])
    graph = ir.Graph([embeds], node.outputs, nodes=[node], opset_imports={"": 23}, name="decoder")
    model = ir.Model(graph, ir_version=10)
    set_folder(model, folder)
    return model


def test_one_that_is_missing_or_another_graph_is_said(tmp_path: Path) -> None:
    model = decoder(tmp_path / "baseline")
    assert reads_embeddings(model)
    with pytest.raises(InputError, match=r"embedding\.onnx, which makes them of token ids, is not beside it"):
        embedding_of(model)
    node_free = decoder(tmp_path)
    ir.save(node_free, tmp_path / NAME)
    assert load_graph(tmp_path / NAME)
    with pytest.raises(InputError, match="is no embedding of nbl-export"):
        embedding_of(model)
