"""ONNX Runtime and PyTorch as decoders and encoders: layers, caches, positions, and the numbers of one pass without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModel

from nbl_export.batch.names import NUM_LOGITS_TO_KEEP
from nbl_export.export.forms import encoder_form
from nbl_export.export.torch import export_torch
from nbl_export.linearize.swap import linearized
from nbl_export.models.forward import encoder_of
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.tasks import task_named
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.runtime.ort import OrtDecoder, OrtEncoder
from nbl_export.runtime.torch import TorchDecoder, TorchEncoder
from tests.encoders import PAD, text_encoder
from tests.fixtures_graph import maps_in_place, pad_left, plan_by_hand, ragged_rows


def teacher_forced(decoder: Any, rows: Sequence[Any], lengths: Sequence[int]) -> list[list[Any]]:
    """For each row the logits of its tokens: a ragged prefill of ``lengths``, then one token at a time."""
    steps = len(rows[0]) - lengths[0]
    ids, mask, positions = pad_left([r[:n] for r, n in zip(rows, lengths, strict=True)])
    past = decoder.empty_past(len(rows))
    out = decoder(ids, mask, positions, past)
    seen = [[*out.logits[i, -n:]] for i, n in enumerate(lengths)]
    for step in range(steps):
        ids = np.array([[r[n + step]] for r, n in zip(rows, lengths, strict=True)], dtype=np.int64)
        mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        positions = np.array([[n + step] for n in lengths], dtype=np.int64)
        out = decoder(ids, mask, positions, out.present)
        assert all(t.shape[2] == mask.shape[1] for pair in out.present for t in pair)
        for i in range(len(rows)):
            seen[i].append(out.logits[i, 0])
    return seen


def test_ort_decoder_knows_its_layers(stories_out: Path, rewritten: Path) -> None:
    base, linear = OrtDecoder(stories_out / "baseline" / "model.onnx"), OrtDecoder(rewritten)
    assert base.kv_layers == (0, 1, 2, 3, 4)
    assert linear.kv_layers == (1, 2, 4)
    assert [k.shape for pair in linear.empty_past(3) for k in pair] == [(3, 4, 0, 8)] * 6
    assert all(k.dtype == np.float32 for pair in linear.empty_past(3) for k in pair)


def test_ort_leaves_out_inputs_that_the_graph_does_not_have(stories_out: Path, tmp_path: Path) -> None:
    """Without attention left, nothing reads positions."""
    path = tmp_path / "model.onnx"
    rewrite_file(stories_out / "baseline" / "model.onnx", plan_by_hand(stories_out, range(5)), path)
    proto = onnx.load(str(path), load_external_data=False)
    read = {name for node in proto.graph.node for name in node.input}
    unread = [i for i in proto.graph.input if i.name not in read]
    assert {"attention_mask", "position_ids"} == {i.name for i in unread}
    for value in unread:
        proto.graph.input.remove(value)
    path.write_bytes(proto.SerializeToString())
    decoder = OrtDecoder(path)
    ids = np.array([[1, 5, 9]], dtype=np.int64)
    feeds = decoder.feeds(ids, np.ones_like(ids), np.arange(3)[None], decoder.empty_past(1))
    assert list(feeds) == ["input_ids", NUM_LOGITS_TO_KEEP]
    result = decoder(ids, np.ones_like(ids), np.arange(3)[None], [])
    assert result.logits.shape == (1, 3, 512) and result.present == ()


@pytest.mark.parametrize("layers", [(), (0,), (0, 1), (2, 4), (0, 1, 2, 3, 4)], ids=str)
def test_masks_and_positions_stay_right_across_decode(
    stories_out: Path, stories_model: Any, layers: tuple[int, ...]
) -> None:
    """Against one pass over the whole row without a cache; the first layer is the one usually asked."""
    plan = plan_by_hand(stories_out, layers)
    lengths = (13, 8, 1)
    rows = ragged_rows([n + 5 for n in lengths], 500, seed=4)
    with linearized(stories_model, plan):
        decoder = TorchDecoder(stories_model, plan.chosen)
        assert decoder.kv_layers == tuple(i for i in range(5) if i not in layers)
        assert len(decoder.empty_past(3)) == 5 - len(layers)
        found = teacher_forced(decoder, rows, lengths)
    for row, logits in zip(rows, found, strict=True):
        with maps_in_place(stories_model, plan), torch.inference_mode():
            ids = torch.from_numpy(row.astype(np.int64))[None]
            expected = stories_model(input_ids=ids, use_cache=False).logits[0].numpy()
        assert len(logits) == len(row)
        np.testing.assert_allclose(np.stack(logits), expected, rtol=0, atol=5e-4)


FEATURES = task_named("feature-extraction")


IDS = np.array([[257, 20, 30, 40, 258], [257, 50, 258, PAD, PAD]])


MASK = (IDS != PAD).astype(np.int64)


INPUTS = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": np.zeros_like(IDS)}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def graph(bert: Path) -> Path:
    model = load_model(find_model(str(bert)))
    path = bert.with_name("model.onnx")
    export_torch(model, path, form=encoder_form(model, FEATURES, None, INPUTS))
    return path


def states(folder: Path, inputs: Any) -> Any:
    with torch.inference_mode():
        output = AutoModel.from_pretrained(folder)(**{n: torch.from_numpy(a) for n, a in inputs.items()})
    return output.last_hidden_state.numpy()


@pytest.mark.parametrize("of", ["pytorch", "onnxruntime"])
def test_every_row_is_the_row_without_its_padding(bert: Path, graph: Path, of: str) -> None:
    model = load_model(find_model(str(bert)))
    encoder: Any = (
        TorchEncoder(encoder_of(model, FEATURES, None, INPUTS)) if of == "pytorch" else OrtEncoder(graph)
    )
    # More than it takes, in another order: by name.
    found = encoder({"position_ids": IDS, **dict(reversed(INPUTS.items()))})
    assert set(found) == {"last_hidden_state", "pooler_output"}
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    for i, length in enumerate(MASK.sum(axis=1)):
        alone = {name: array[i : i + 1, :length] for name, array in INPUTS.items()}
        np.testing.assert_allclose(
            found["last_hidden_state"][i, :length], states(bert, alone)[0], rtol=0, atol=1e-4
        )
