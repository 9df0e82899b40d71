"""Logits of the last positions: the same numbers as of all, an input that may be left out, and no graph harmed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from nbl_export.batch.names import NUM_LOGITS_TO_KEEP
from nbl_export.export.lm_head import add_num_logits_input, sliced_lm_head
from nbl_export.export.torch import trace
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.runtime.ort import OrtDecoder
from tests.families import unsaved
from tests.fixtures_graph import pad_left, ragged_rows
from tests.sessions import cpu_session

ROWS = ragged_rows((9, 4, 7), 250)


def logits(path: Path, keep: int | None) -> np.ndarray:
    """Logits of a padded prefill, ``keep`` positions asked for; None leaves the input out."""
    decoder = OrtDecoder(path)
    ids, mask, positions = pad_left(ROWS)
    feeds = decoder.feeds(ids, mask, positions, decoder.empty_past(len(ROWS)))
    del feeds[NUM_LOGITS_TO_KEEP]
    if keep is not None:
        feeds[NUM_LOGITS_TO_KEEP] = np.array(keep, dtype=np.int64)
    return decoder.run(feeds).logits


@pytest.mark.parametrize("keep", [1, 2, 9, 12])
def test_the_last_logits_are_those_of_the_whole(tiny_graph: Path, keep: int) -> None:
    whole = logits(tiny_graph, None)
    assert whole.shape == (3, 9, 260)
    np.testing.assert_array_equal(logits(tiny_graph, 0), whole)
    np.testing.assert_allclose(logits(tiny_graph, keep), whole[:, -keep:], rtol=0, atol=1e-5)


def test_a_program_need_not_know_the_input(tiny_graph: Path) -> None:
    session = cpu_session(tiny_graph)
    assert NUM_LOGITS_TO_KEEP not in {i.name for i in session.get_inputs()}
    assert [i.name for i in session.get_overridable_initializers()] == [NUM_LOGITS_TO_KEEP]


# gemma2 caps its logits behind the product; gpt2 and bloom tie the head; a head may have a bias (phi).
@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma2", "phi", "qwen3"])
def test_other_heads(name: str, tmp_path: Path) -> None:
    model = unsaved(name, num_hidden_layers=1).eval()
    path = save_graph(trace(model), tmp_path / "model.onnx")[0]
    whole = logits(path, None)
    np.testing.assert_allclose(logits(path, 1), whole[:, -1:], rtol=0, atol=1e-5)
    ids, mask, positions = (torch.from_numpy(a) for a in pad_left(ROWS))
    with torch.inference_mode():
        taken = {"position_ids": positions} if name not in ("bloom",) else {}
        wanted = model(input_ids=ids, attention_mask=mask, **taken).logits
    np.testing.assert_allclose(whole[:, -1], wanted[:, -1].numpy(), rtol=0, atol=2e-4)


def test_the_product_is_found_again_and_nothing_is_added_twice(tiny_graph: Path) -> None:
    model = load_graph(tiny_graph)
    nodes = model.graph.num_nodes()
    head = sliced_lm_head(model)
    assert head is not None and head.op_type == "MatMul" and "logits" in {v.name for v in head.outputs}
    assert add_num_logits_input(model) and model.graph.num_nodes() == nodes


def test_a_static_cache_pads_on_the_right_and_makes_all_logits(static_graph: Path) -> None:
    model = load_graph(static_graph)
    assert NUM_LOGITS_TO_KEEP not in {v.name for v in model.graph.inputs} and sliced_lm_head(model) is None


def reshaped(model: ir.Model) -> None:
    head = sliced_lm_head(model)
    assert head is not None
    model.graph.inputs.remove(next(v for v in model.graph.inputs if v.name == NUM_LOGITS_TO_KEEP))
    logits = next(v for v in model.graph.outputs if v.name == "logits")
    view = ir.node("Flatten", [head.outputs[0]], {"axis": 2})
    head.outputs[0].name, view.outputs[0].name = "flat", "logits"
    view.outputs[0].type, view.outputs[0].shape = logits.type, ir.Shape([None, 260])
    model.graph.outputs[list(model.graph.outputs).index(logits)] = view.outputs[0]
    model.graph.append(view)


def by_two(model: ir.Model) -> None:
    model.graph.inputs.remove(next(v for v in model.graph.inputs if v.name == NUM_LOGITS_TO_KEEP))
    logits = next(v for v in model.graph.outputs if v.name == "logits")
    total = ir.node("Add", [logits, logits])
    logits.name, total.outputs[0].name = "half", "logits"
    total.outputs[0].type, total.outputs[0].shape = logits.type, logits.shape
    model.graph.outputs[list(model.graph.outputs).index(logits)] = total.outputs[0]
    model.graph.append(total)


@pytest.mark.parametrize("change", [reshaped, by_two])
def test_a_head_that_is_not_understood_is_left_alone(
    tiny_graph: Path, change: Callable[[ir.Model], None]
) -> None:
    model = load_graph(tiny_graph)
    change(model)
    nodes = [node.op_type for node in model.graph]
    assert not add_num_logits_input(model)
    assert [node.op_type for node in model.graph] == nodes
    assert NUM_LOGITS_TO_KEEP not in {v.name for v in model.graph.inputs}
