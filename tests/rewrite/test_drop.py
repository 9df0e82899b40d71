"""Layers left out altogether: the graph is PyTorch's model whose attention there adds nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.errors import InputError
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.rewrite.drop import drop_layers
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.runtime.ort import OrtDecoder
from tests.fixtures_graph import pad_left, plan_by_hand, ragged_rows


def without_attention(model: Any, layers: tuple[int, ...], row: Any) -> Any:
    """Logits [sequence, vocab] of transformers' own model whose attention in ``layers`` writes zeros."""
    hooks = [
        model.model.layers[i].self_attn.register_forward_hook(
            lambda _m, _a, output: (torch.zeros_like(output[0]), *output[1:])
        )
        for i in layers
    ]
    try:
        with torch.inference_mode():
            ids = torch.from_numpy(row.astype(np.int64))[None]
            return model(input_ids=ids, use_cache=False).logits[0].numpy()
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("layers", [(0,), (1, 4), (0, 1, 2, 3, 4)], ids=str)
def test_what_is_left_is_the_model_without_those_layers(
    stories_out: Path, stories_model: Any, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    path = tmp_path / "linear.onnx"
    rewrite_file(stories_out / "baseline" / "model.onnx", plan_by_hand(stories_out, layers), path)
    graph = load_graph(path)
    before = len(list(graph.graph))
    drop_layers(graph)
    # A norm, the map's product and sum, and the residual addition.
    assert len(list(graph.graph)) == before - 4 * len(layers)
    save_graph(graph, tmp_path / "dropped.onnx")
    decoder = OrtDecoder(tmp_path / "dropped.onnx")
    rows = ragged_rows((9, 4), 500, seed=7)
    logits = decoder(*pad_left(rows), decoder.empty_past(2)).logits
    for i, row in enumerate(rows):
        expected = without_attention(stories_model, layers, row)
        np.testing.assert_allclose(logits[i, 9 - len(row) :], expected, rtol=0, atol=5e-4)


def test_a_graph_without_linear_layers_stays_as_it_is(stories_out: Path) -> None:
    graph = load_graph(stories_out / "baseline" / "model.onnx")
    before = [node.name for node in graph.graph]
    drop_layers(graph)
    assert [node.name for node in graph.graph] == before


def test_an_output_that_is_read_by_more_than_a_sum_cannot_be_left_out(stories_out: Path) -> None:
    graph = load_graph(stories_out / "model.onnx")
    y = next(v for n in graph.graph for v in n.outputs if "nbl_linear.output" in str(v.name))
    other = next(n for n in graph.graph if n.op_type == "MatMul" and "nbl_linear" not in str(n.name))
    other.replace_input_with(0, y)
    with pytest.raises(InputError, match=r"layer \d cannot be dropped: .* but read by MatMul"):
        drop_layers(graph)
