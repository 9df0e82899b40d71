"""Attention that counts places in the cache gets each row's positions: padded and cached rows are computed as alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.export.checks import check_form
from nbl_export.export.forms import FORMS
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.row_positions import count_positions
from tests.alone import furthest, own_logits, rows_of
from tests.tiny_types import tiny_model

LLAMA_4 = "llama4_text"  # its temperature begins at 100 tokens, its chunks have 64
# One with a rotary embedding, and one with a temperature.
TWO_LAYERS = {"num_hidden_layers": 2, "no_rope_layers": [1, 0]}
FORMS_OF_IT = ("concat", "static", "none")


@pytest.fixture
def model() -> Any:
    return tiny_model(LLAMA_4, **TWO_LAYERS)


@pytest.mark.parametrize("form", FORMS_OF_IT)
def test_the_temperature_follows_each_rows_positions(model: Any, form: str, tmp_path: Path) -> None:
    # Decoding crosses 100 in the second row, and so do the padded places of the third, whose positions do not.
    rows = rows_of(135, 104, 60, 99)
    assert furthest(model, tmp_path, form, rows, steps=5) < 1e-4


@pytest.mark.parametrize("form", ["concat", "static"])
def test_300_tokens_are_decoded_across_it(form: str, tmp_path: Path) -> None:
    model = tiny_model(LLAMA_4, **TWO_LAYERS, max_position_embeddings=512)
    assert furthest(model, tmp_path, form, rows_of(390), steps=300) < 1e-4


def test_the_temperature_acts_on_these_rows(model: Any) -> None:
    row = rows_of(104)[0]
    with_it = own_logits(model, row)
    for block in model.model.layers:
        block.self_attn.attn_temperature_tuning = False
    difference = np.abs(own_logits(model, row) - with_it).max(axis=-1)
    assert difference[:99].max() == 0 and difference[99:].max() > 0.1


@pytest.mark.parametrize("form", FORMS_OF_IT)
def test_it_is_served(model: Any, form: str) -> None:
    check_form(model, FORMS[form])


def test_padded_rows_of_pytorch_are_the_rows_alone(model: Any) -> None:
    long, short = rows_of(130, 105)
    alone = own_logits(model, short)
    ids = torch.from_numpy(np.stack([long, np.r_[np.full(25, 1), short]]))
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clip(0)}

    def off(found: Any) -> float:
        with torch.inference_mode():
            return float(np.abs(found(**batch).logits[1, 25:].numpy() - alone).max())

    assert off(model) > 0.01  # transformers' own
    count_positions(model)
    count_positions(model)  # a second time
    assert off(model) < 1e-4
    assert off(copy.deepcopy(model)) < 1e-4
    np.testing.assert_array_equal(own_logits(model, short), alone)
    assert [len(block._forward_pre_hooks) for block in model.model.layers] == [1] * 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neo", "mixtral"])
def test_other_models_are_left_alone(name: str) -> None:
    other = tiny_model(name)
    count_positions(other)
    assert not any(module._forward_pre_hooks for module in other.modules())


def test_facts_are_those_without(model: Any) -> None:
    facts = dummy_run(tiny_model(LLAMA_4, **TWO_LAYERS))
    count_positions(model)
    assert dummy_run(model) == facts
