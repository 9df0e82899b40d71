"""The exported graph: its documented interface, what is stored in it, and that it computes the model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from nbl_export.errors import BuildError
from nbl_export.export.torch import export_torch
from tests.conftest import ROOT
from tests.fixtures_graph import original_logits, pad_left, ragged_rows
from tests.sessions import cpu_session, empty_past
from tests.tiny_types import tiny_model as random_model

LAYERS, HEADS, DIM, VOCAB, WIDTH = 4, 2, 8, 260, 32


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
    for trace in (str(ROOT), "site-packages", ".py", "Traceback", str(Path.home()), str(tiny_graph.parent)):
        assert trace.encode() not in raw, trace
    assert not proto.doc_string and not proto.graph.doc_string
    assert not any(n.doc_string or n.metadata_props for n in proto.graph.node)


def test_one_external_data_file(tiny_graph: Path, proto: onnx.ModelProto) -> None:
    assert {p.name for p in tiny_graph.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    external = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    locations = {e.value for t in external for e in t.external_data if e.key == "location"}
    assert locations == {"model.onnx.data"}
    # Seven matrices a layer and the embeddings.
    assert len(external) == 7 * LAYERS + 1


def stored(path: Path) -> Counter[tuple[int, ...]]:
    """How many float initializers there are of each shape (up to a transpose)."""
    graph = onnx.load(str(path), load_external_data=False).graph
    floats = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    return Counter(tuple(sorted(t.dims)) for t in floats)


def distinct(model: torch.nn.Module) -> Counter[tuple[int, ...]]:
    """The same of a PyTorch model; equal weights count once, the rotary frequencies are a buffer."""
    weights = {(tuple(sorted(p.shape)), p.numpy().tobytes()) for p in model.parameters()}
    return Counter(shape for shape, _ in weights) + Counter([(DIM // 2,)])


def test_tied_embeddings_are_stored_once(tiny_graph: Path, tiny_model: torch.nn.Module) -> None:
    assert stored(tiny_graph) == distinct(tiny_model)
    assert stored(tiny_graph)[WIDTH, VOCAB] == 1
    matrices = sum(p.numel() for p in tiny_model.parameters() if p.ndim == 2)
    size = tiny_graph.with_name("model.onnx.data").stat().st_size
    assert 4 * matrices <= size < 4 * matrices + 4096


def run(session: Any, ids: Any, mask: Any, positions: Any, past: list[Any]) -> tuple[Any, list[Any]]:
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    names = [i.name for i in session.get_inputs()][3:]
    logits, *present = session.run(None, {**feeds, **dict(zip(names, past, strict=True))})
    return logits, present


def compare_with_transformers(
    path: Path, model: torch.nn.Module, lengths: tuple[int, ...], chunks: tuple[int, ...], vocab: int
) -> float:
    """Prefill ragged prompts of ``lengths`` tokens, then ``chunks`` more tokens at a time.

    Every real token's logits are held against transformers' own sdpa on the whole row, without
    padding and without a cache. Returns the largest difference; asserts that something was compared.
    """
    session = cpu_session(path)
    rows = ragged_rows([n + sum(chunks) for n in lengths], vocab)
    expected = [original_logits(model, row) for row in rows]
    ids, mask, positions = pad_left([row[:n] for row, n in zip(rows, lengths, strict=True)])
    past = [*empty_past(session, len(rows)).values()]
    worst = 0.0
    done = list(lengths)
    logits, past = run(session, ids, mask, positions, past)
    for number, n in enumerate(lengths):
        worst = max(worst, np.abs(logits[number, -n:] - expected[number][:n]).max())
    for size in chunks:
        ids = np.stack([row[at : at + size].astype(np.int64) for row, at in zip(rows, done, strict=True)])
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        positions = np.stack([np.arange(at, at + size) for at in done])
        logits, past = run(session, ids, mask, positions, past)
        assert past[0].shape[2] == mask.shape[1]
        for number, at in enumerate(done):
            worst = max(worst, np.abs(logits[number] - expected[number][at : at + size]).max())
        done = [at + size for at in done]
    assert done == [len(row) for row in rows]
    return float(worst)


@pytest.mark.parametrize(
    ("lengths", "chunks"),
    [
        pytest.param((11, 6, 2), (1, 1, 1), id="ragged batch of 3, then decode"),
        pytest.param((7,), (1, 1), id="batch 1, then decode"),
        pytest.param((1,), (1, 1, 1), id="one token, then decode"),
        pytest.param((9, 4), (3, 2, 1), id="several tokens after the cache"),
    ],
)
def test_logits_equal_transformers(
    tiny_graph: Path, tiny_model: torch.nn.Module, lengths: tuple[int, ...], chunks: tuple[int, ...]
) -> None:
    assert compare_with_transformers(tiny_graph, tiny_model, lengths, chunks, VOCAB) < 2e-4


def test_what_torch_cannot_export_is_a_build_error(
    tiny_model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise RuntimeError("unsupported: first line\nsecond line")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(BuildError, match="unsupported: first line") as caught:
        export_torch(tiny_model, tmp_path / "model.onnx")
    assert "second line" not in str(caught.value) and "LlamaForCausalLM" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_that_torch_wraps_is_an_interrupt(
    tiny_model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: Any, **_kwargs: Any) -> Any:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("a step of the exporter failed") from error

    monkeypatch.setattr(torch.onnx, "export", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_torch(tiny_model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


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
