"""The exported graphs, growing, static, of encoders: interface, what is stored, and that they are the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from transformers import (
    AutoModel,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.models.opt import modeling_opt

from nbl_export.batch import NUM_LOGITS_TO_KEEP
from nbl_export.errors import BuildError, InputError
from nbl_export.export.forms import STATIC, encoder_form
from nbl_export.export.tidy import add_num_logits_input, sliced_lm_head
from nbl_export.export.torch import export_torch, trace
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.models.candidates import check_supported
from nbl_export.models.folder import Pooling, task_named
from nbl_export.models.forward import SENTENCE
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.runtime.ort import OrtModel
from tests.alone import graph_logits
from tests.conftest import ROOT
from tests.families import unsaved
from tests.fixtures_graph import cpu_session, empty_past, original_logits, pad_left, ragged_rows, run_graph
from tests.tiny import PAD, WIDTH, text_encoder
from tests.tiny_types import tiny_model as random_model

LAYERS, HEADS, DIM, VOCAB = 4, 2, 8, 260


@pytest.fixture(scope="module")
def proto(tiny_graph: Path) -> onnx.ModelProto:
    return onnx.load(str(tiny_graph), load_external_data=False)


def interface(values: Any) -> list[tuple[str, int, tuple[int | str, ...]]]:
    return [
        (
            v.name,
            v.type.tensor_type.elem_type,
            tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim),
        )
        for v in values
    ]


def test_interface_is_the_documented_one(proto: onnx.ModelProto) -> None:
    tokens = ("batch_size", "sequence_length")
    total = ("batch_size", "total_sequence_length")
    inputs = [
        ("input_ids", onnx.TensorProto.INT64, tokens),
        ("attention_mask", onnx.TensorProto.INT64, total),
        ("position_ids", onnx.TensorProto.INT64, tokens),
    ]
    outputs = [("logits", onnx.TensorProto.FLOAT, (tokens[0], "num_logits", VOCAB))]
    for layer in range(LAYERS):
        for side in ("key", "value"):
            past = ("batch_size", HEADS, "past_sequence_length", DIM)
            present = ("batch_size", HEADS, "total_sequence_length", DIM)
            inputs.append((f"past_key_values.{layer}.{side}", onnx.TensorProto.FLOAT, past))
            outputs.append((f"present.{layer}.{side}", onnx.TensorProto.FLOAT, present))
    inputs.append(("num_logits_to_keep", onnx.TensorProto.INT64, ()))
    assert interface(proto.graph.input) == inputs
    assert [i.name for i in proto.graph.initializer if i.name == inputs[-1][0]], "it has a default"
    assert interface(proto.graph.output) == outputs


def test_opset_23_and_standard_operators_only(proto: onnx.ModelProto) -> None:
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 23)]
    assert {node.domain for node in proto.graph.node} == {""}
    assert not proto.functions


def test_shared_expressions_are_computed_once(proto: onnx.ModelProto) -> None:
    ops = Counter(node.op_type for node in proto.graph.node)
    assert (ops["Cos"], ops["Sin"], ops["Attention"]) == (1, 1, LAYERS)
    seen = [
        (n.op_type, tuple(n.input), tuple(sorted(str(a) for a in n.attribute)))
        for n in proto.graph.node
        if n.op_type in ("Shape", "Cos", "Sin", "Cast", "Range")
    ]
    assert len(seen) == len(set(seen))


def test_nothing_of_this_machine_is_written(tiny_graph: Path, proto: onnx.ModelProto) -> None:
    raw = tiny_graph.read_bytes() + tiny_graph.with_name("model.onnx.data").read_bytes()
    for found in (str(ROOT), "site-packages", ".py", "Traceback", str(Path.home()), str(tiny_graph.parent)):
        assert found.encode() not in raw, found
    assert not proto.doc_string and not proto.graph.doc_string
    assert not any(n.doc_string or n.metadata_props for n in proto.graph.node)


def test_tied_embeddings_are_stored_once(tiny_graph: Path, tiny_model: torch.nn.Module) -> None:
    assert {p.name for p in tiny_graph.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    matrices = sum(p.numel() for p in tiny_model.parameters() if p.ndim == 2)
    size = tiny_graph.with_name("model.onnx.data").stat().st_size
    assert 4 * matrices <= size < 4 * matrices + 4096


@pytest.mark.parametrize("form", ["concat", "static"])
@pytest.mark.parametrize(
    ("lengths", "steps", "size"),
    [
        pytest.param((14, 9, 5), 3, 1, id="ragged batch of 3, then decode"),
        pytest.param((4,), 3, 1, id="one token, then decode"),
        pytest.param((15, 10), 2, 3, id="several tokens after the cache"),
    ],
)
def test_logits_equal_transformers(
    tiny_graph: Path,
    static_graph: Path,
    tiny_model: torch.nn.Module,
    form: str,
    lengths: tuple[int, ...],
    steps: int,
    size: int,
) -> None:
    rows, graph = ragged_rows(lengths, VOCAB), static_graph if form == "static" else tiny_graph
    for row, found in zip(rows, graph_logits(graph, form, rows, steps, size), strict=True):
        np.testing.assert_allclose(found, original_logits(tiny_model, row), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("cause", "raised"), [(None, BuildError), (KeyboardInterrupt(), KeyboardInterrupt)], ids=str
)
def test_what_torch_cannot_export_is_a_build_error_and_an_interrupt_is_one(
    tiny_model: torch.nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cause: BaseException | None,
    raised: type[BaseException],
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("unsupported: first line\nsecond line") from cause

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(raised) as caught:
        export_torch(tiny_model, tmp_path / "model.onnx")
    if raised is BuildError:
        message = str(caught.value)
        assert "LlamaForCausalLM" in message and "unsupported: first line" in message
        assert "second line" not in message
    assert list(tmp_path.iterdir()) == []


def test_the_epsilon_of_a_norm_stays_however_small_it_is(tmp_path: Path) -> None:
    # Of Helium and Moshi it is 1e-8, and the embedding of their padding is zero.
    model = random_model("llama", rms_norm_eps=1e-8, num_hidden_layers=1)
    model.get_input_embeddings().weight[1] = 0.0
    export_torch(model, tmp_path / "model.onnx")
    ids, mask, positions = pad_left([np.arange(3, 9), np.arange(5, 8)])
    ids[mask == 0] = 1
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    session = cpu_session(tmp_path / "model.onnx")
    (logits,) = session.run(["logits"], {**feeds, **empty_past(session, 2)})
    for row, length in ((0, 6), (1, 3)):
        own = model(input_ids=torch.from_numpy(ids[row : row + 1, 6 - length :])).logits[0]
        np.testing.assert_allclose(logits[row, 6 - length :], own.numpy(), rtol=0, atol=1e-4)


# the last logits ----------------------------------------------------------------------------------


ROWS = ragged_rows((9, 4, 7), 250)


def logits(path: Path, keep: int | None) -> np.ndarray:
    """Logits of a padded prefill, ``keep`` positions asked for; None leaves the input out."""
    decoder = OrtModel(path)
    ids, mask, positions = pad_left(ROWS)
    feeds = decoder.interface.named({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    feeds |= decoder.interface.empty_cache(len(ROWS), 0, np.float32)
    del feeds[NUM_LOGITS_TO_KEEP]
    if keep is not None:
        feeds[NUM_LOGITS_TO_KEEP] = np.array(keep, dtype=np.int64)
    (found,) = decoder.session.run(["logits"], feeds)
    return np.asarray(found)


@pytest.mark.parametrize("keep", [1, 2, 12])
def test_the_last_logits_are_those_of_the_whole(tiny_graph: Path, keep: int) -> None:
    whole = logits(tiny_graph, None)
    assert whole.shape == (3, 9, 260)
    np.testing.assert_array_equal(logits(tiny_graph, 0), whole)
    np.testing.assert_allclose(logits(tiny_graph, keep), whole[:, -keep:], rtol=0, atol=1e-5)


def test_logits_that_are_capped_behind_the_product(tmp_path: Path) -> None:
    model = unsaved("gemma2", num_hidden_layers=1).eval()
    path = save_graph(trace(model), tmp_path / "model.onnx")[0]
    whole = logits(path, None)
    np.testing.assert_allclose(logits(path, 1), whole[:, -1:], rtol=0, atol=1e-5)
    ids, mask, positions = (torch.from_numpy(a) for a in pad_left(ROWS))
    with torch.inference_mode():
        wanted = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    np.testing.assert_allclose(whole[:, -1], wanted[:, -1].numpy(), rtol=0, atol=2e-4)


def test_the_product_is_found_again_and_nothing_is_added_twice(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    nodes = model.graph.num_nodes()
    head = sliced_lm_head(model)
    assert head is not None and head.op_type == "MatMul" and "logits" in {v.name for v in head.outputs}
    assert add_num_logits_input(model) and model.graph.num_nodes() == nodes


def by_two(model: ir.Model) -> None:
    model.graph.inputs.remove(next(v for v in model.graph.inputs if v.name == NUM_LOGITS_TO_KEEP))
    logits = next(v for v in model.graph.outputs if v.name == "logits")
    total = ir.node("Add", [logits, logits])
    logits.name, total.outputs[0].name = "half", "logits"
    total.outputs[0].type, total.outputs[0].shape = logits.type, logits.shape
    model.graph.outputs[list(model.graph.outputs).index(logits)] = total.outputs[0]
    model.graph.append(total)


def test_a_head_that_is_not_understood_is_left_alone(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    by_two(model)
    nodes = [node.op_type for node in model.graph]
    assert not add_num_logits_input(model)
    assert [node.op_type for node in model.graph] == nodes
    assert NUM_LOGITS_TO_KEEP not in {v.name for v in model.graph.inputs}


# a static cache -----------------------------------------------------------------------------------


SMALL_OPT: Any = {
    "vocab_size": 50,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 32,
    "pad_token_id": 1,
}


# Structure ---------------------------------------------------------------------------------------


def test_the_static_interface_is_the_documented_one(static_graph: Path) -> None:
    static_proto = onnx.load(str(static_graph), load_external_data=False)
    tokens = ("batch_size", "sequence_length")
    buffer = ("batch_size", HEADS, "max_sequence_length", DIM)
    pairs = [f"{layer}.{side}" for layer in range(LAYERS) for side in ("key", "value")]
    assert interface(static_proto.graph.input) == [
        ("input_ids", onnx.TensorProto.INT64, tokens),
        ("position_ids", onnx.TensorProto.INT64, tokens),
        ("write_indices", onnx.TensorProto.INT64, ("batch_size",)),
        *((f"past_key_values.{p}", onnx.TensorProto.FLOAT, buffer) for p in pairs),
    ]
    assert [(o.domain, o.version) for o in static_proto.opset_import] == [("", 24)]
    assert {node.domain for node in static_proto.graph.node} == {""} and not static_proto.functions
    assert interface(static_proto.graph.output) == [
        ("logits", onnx.TensorProto.FLOAT, (*tokens, VOCAB)),
        *((f"present.{p}", onnx.TensorProto.FLOAT, buffer) for p in pairs),
    ]


# Other families ----------------------------------------------------------------------------------


def test_a_model_that_makes_its_mask_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = OPTForCausalLM(OPTConfig(**SMALL_OPT)).eval()
    check_supported(model)  # as it is
    mask = torch.ones(2, 1, 3, 7, dtype=torch.bool)
    monkeypatch.setattr(modeling_opt, "create_causal_mask", lambda **_: mask, raising=False)
    with pytest.raises(
        InputError, match=r"OPTForCausalLM makes its attention mask itself.*--kv-cache concat"
    ):
        export_torch(model, tmp_path / "model.onnx", form=STATIC)


# an encoder ---------------------------------------------------------------------------------------


FEATURES = task_named("feature-extraction")
IDS = np.array([[257, 20, 30, 40, 258], [257, 50, 258, PAD, PAD]])
TEXT = {
    "input_ids": IDS,
    "attention_mask": (IDS != PAD).astype(np.int64),
    "token_type_ids": np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]),
}


def exported(folder: Path, target: Path, inputs: Any, pooling: Pooling | None) -> onnx.ModelProto:
    model = load_model(find_model(str(folder)))
    export_torch(model, target, form=encoder_form(model, FEATURES, pooling, inputs))
    return onnx.load(str(target), load_external_data=False)


def dims(values: Any) -> dict[str, tuple[str | int, ...]]:
    return {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def test_text_goes_in_by_three_names_and_comes_out_as_states_and_a_sentence(
    bert: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    proto = exported(bert, path, TEXT, Pooling("mean", False, ()))
    assert dims(proto.graph.input) == dict.fromkeys(TEXT, ("batch_size", "sequence_length"))
    assert list(dims(proto.graph.input)) == list(TEXT)
    found = dims(proto.graph.output)
    assert found["last_hidden_state"] == ("batch_size", "sequence_length", WIDTH)
    assert found[SENTENCE] == ("batch_size", WIDTH)
    assert {o.version for o in proto.opset_import if o.domain == ""} == {23}
    with torch.inference_mode():
        states = AutoModel.from_pretrained(bert)(**{n: torch.from_numpy(a) for n, a in TEXT.items()})
    expected, mask = states.last_hidden_state.double().numpy(), TEXT["attention_mask"].astype(bool)
    outputs = run_graph(path, TEXT)
    np.testing.assert_allclose(outputs["last_hidden_state"][mask], expected[mask], rtol=0, atol=1e-4)
    means = np.array([expected[i][mask[i]].mean(0) for i in range(2)])
    np.testing.assert_allclose(outputs[SENTENCE], means, rtol=0, atol=1e-4)
    # One row, longer than any that was traced.
    one = {n: np.concatenate([a[:1], a[:1]], axis=1) for n, a in TEXT.items()}
    assert run_graph(path, one)["last_hidden_state"].shape == (1, 10, WIDTH)
