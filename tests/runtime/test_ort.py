"""The decoder of ONNX Runtime: its layers, what it feeds by name, and that it decodes as PyTorch recomputes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from nbl_export.batch.names import ALL_LOGITS, NUM_LOGITS_TO_KEEP
from nbl_export.errors import InputError
from nbl_export.graph.cache import KV_LAYERS_KEY
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.runtime.ort import OrtDecoder
from tests.fixtures_graph import maps_in_place, plan_by_hand, ragged_rows
from tests.folders import copied
from tests.runtime.by_hand import teacher_forced


def test_ort_decoder_knows_its_layers(stories_out: Path, rewritten: Path) -> None:
    base, linear = OrtDecoder(stories_out / "baseline" / "model.onnx"), OrtDecoder(rewritten)
    assert base.kv_layers == (0, 1, 2, 3, 4)
    assert linear.kv_layers == (1, 2, 4)
    assert [k.shape for pair in linear.empty_past(3) for k in pair] == [(3, 4, 0, 8)] * 6
    assert all(k.dtype == np.float32 for pair in linear.empty_past(3) for k in pair)


def test_ort_feeds_by_name(rewritten: Path) -> None:
    decoder = OrtDecoder(rewritten)
    ids = np.array([[1, 2]], dtype=np.int64)
    mask, positions = np.ones((1, 5), dtype=np.int64), ids + 2
    past = [
        tuple(np.full((1, 4, 3, 8), 10 * n + side, dtype=np.float32) for side in (0, 1)) for n in range(3)
    ]
    feeds = decoder.feeds(ids, mask, positions, past)  # type: ignore[arg-type]
    assert set(feeds) == {i.name for i in decoder.session.get_inputs()} | {NUM_LOGITS_TO_KEEP}
    assert feeds[NUM_LOGITS_TO_KEEP] == ALL_LOGITS
    assert feeds["input_ids"] is ids and feeds["attention_mask"] is mask
    assert feeds["position_ids"] is positions
    for n in range(3):
        for side, name in enumerate(("key", "value")):
            assert np.unique(feeds[f"past_key_values.{n}.{name}"]).tolist() == [10 * n + side]
    with pytest.raises(ValueError, match="argument"):
        decoder.feeds(ids, mask, positions, past[:2])  # type: ignore[arg-type]


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


def test_ort_decodes_as_it_recomputes(rewritten: Path, stories_model: Any, stories_out: Path) -> None:
    rows = ragged_rows([12, 9], 500, seed=5)
    found = teacher_forced(OrtDecoder(rewritten), rows, (8, 5))
    plan = plan_by_hand(stories_out, (0, 3))
    for row, logits in zip(rows, found, strict=True):
        with maps_in_place(stories_model, plan), torch.inference_mode():
            ids = torch.from_numpy(row.astype(np.int64))[None]
            expected = stories_model(input_ids=ids, use_cache=False).logits[0].numpy()
        np.testing.assert_allclose(np.stack(logits), expected, rtol=0, atol=5e-4)


def test_metadata_that_contradicts_the_inputs_is_refused(rewritten: Path, tmp_path: Path) -> None:
    path = copied(rewritten, tmp_path)
    proto = onnx.load(str(path), load_external_data=False)
    next(p for p in proto.metadata_props if p.key == KV_LAYERS_KEY).value = "[1, 2]"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match="names 2 layers with a KV cache, the graph has 3"):
        OrtDecoder(path)
