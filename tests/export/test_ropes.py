"""Rotary embeddings that go by the longest row are in the graph with both ways, and the model is as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nbl_export.export.ropes import both_ways

from nbl_export.export.checks import check_form
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import export_torch
from tests.alone import furthest, graph_logits, own_logits, own_steps, rows_of
from tests.tiny_types import tiny_model

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
# Each has a switch at 100 tokens.
MODELS: dict[str, Any] = {
    "phi3": lambda: tiny_model("phi3", num_hidden_layers=2, max_position_embeddings=512),
    "phimoe": lambda: tiny_model("phimoe", num_hidden_layers=2, max_position_embeddings=512),
    "dynamic": lambda: tiny_model(
        "llama", num_hidden_layers=2, max_position_embeddings=100, rope_parameters=DYNAMIC
    ),
}
# Up to its positions this family has frequencies of its own.
HUNYUAN = {**DYNAMIC, "alpha": 1000.0}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


def test_the_switch_acts(model: Any) -> None:
    # A token of a text of 99 has other logits where more follow it, which no attention could do.
    row = rows_of(135)[0]
    assert np.abs(own_logits(model, row)[:99] - own_logits(model, row[:99])).max() > 0.01
    row = row[:99]
    assert np.abs(own_logits(model, row)[:60] - own_logits(model, row[:60])).max() < 1e-4


@pytest.mark.parametrize("form", ["concat", "static", "none"])
def test_both_ways_are_in_the_graph(model: Any, form: str, tmp_path: Path) -> None:
    check_form(model, FORMS[form])
    rows = [rows_of(length) for length in (60, 100, 101, 135)]
    expected = [own_logits(model, row) for (row,) in rows]
    path = export_torch(model, tmp_path / "model.onnx", form=FORMS[form])[0]
    for row, own in zip(rows, expected, strict=True):
        assert np.abs(graph_logits(path, form, row, 0)[0] - own).max() < 1e-4


@pytest.mark.parametrize("form", ["concat", "static"])
def test_decoding_across_it_is_transformers_own(model: Any, form: str, tmp_path: Path) -> None:
    assert furthest(model, tmp_path, form, rows_of(390), steps=300, together=True) < 1e-4


@pytest.mark.parametrize("form", ["concat", "static"])
def test_a_short_row_has_the_frequencies_of_the_longest(model: Any, form: str, tmp_path: Path) -> None:
    rows = rows_of(120, 50)
    # What transformers keeps of a longer text it forgets at a short one.
    alone = [own_logits(model, row[:-3]) for row in rows]
    off = [np.abs(t[:-3] - a).max() for t, a in zip(own_steps(model, rows, 3), alone, strict=True)]
    assert off[0] < 1e-4 and off[1] > 0.01
    own_logits(model, rows_of(20)[0])
    assert furthest(model, tmp_path, form, rows, steps=3, together=True) < 1e-4


def test_the_model_is_as_it_was(model: Any) -> None:
    before = own_logits(model, rows_of(60)[0])
    ids = torch.from_numpy(rows_of(135)[0])[None]
    whole = own_logits(model, ids[0].numpy())
    with both_ways(model), torch.inference_mode():
        np.testing.assert_array_equal(model(input_ids=ids, use_cache=False).logits[0].numpy(), whole)
        found = model(input_ids=torch.from_numpy(rows_of(60)[0])[None], use_cache=False).logits[0].numpy()
        np.testing.assert_array_equal(found, before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.max is not None and torch.max(torch.tensor([1, 3])) == 3


def test_other_rotary_embeddings_are_left_alone() -> None:
    model = tiny_model("llama")
    with both_ways(model):
        assert not any("forward" in vars(module) for module in model.modules())


def test_frequencies_of_a_familys_own_are_kept(tmp_path: Path) -> None:
    model = tiny_model(
        "hunyuan_v1_dense", num_hidden_layers=2, max_position_embeddings=100, rope_parameters=HUNYUAN
    )
    check_form(model, FORMS["concat"])
    rows = [rows_of(60), rows_of(135)]
    expected = [own_logits(model, row) for (row,) in rows]
    path = export_torch(model, tmp_path / "model.onnx")[0]
    for row, own in zip(rows, expected, strict=True):
        assert np.abs(graph_logits(path, "concat", row, 0)[0] - own).max() < 1e-4
