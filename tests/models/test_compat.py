"""What differs between releases of transformers, of whichever one is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Gemma2Config, masking_utils

from nbl_export.models.compat import enable_softcapping, growing_mask, query_length, save_tokenizer


@pytest.mark.parametrize("told", [3, torch.arange(4, 7)], ids=["number", "places"])
def test_query_length(told: Any) -> None:
    assert query_length(told) == 3


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_the_mask_where_transformers_has_only_one_by_vmap(
    monkeypatch: pytest.MonkeyPatch, window: int | None, padded: bool
) -> None:
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position: None)
    past, new = 2, 3
    real = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=bool)
    rule = (
        masking_utils.sliding_window_causal_mask_function(window)
        if window
        else masking_utils.causal_mask_function
    )
    found = growing_mask()(
        batch_size=2,
        cache_position=torch.arange(past, past + new),
        kv_length=past + new,
        kv_offset=0,
        mask_function=rule,
        attention_mask=torch.from_numpy(real) if padded else None,
        dtype=torch.float32,
    )
    query, key = np.arange(past, past + new)[:, None], np.arange(past + new)
    visible = (key <= query) & (query - key < (window or 99))
    expected = visible[None, None] & (real[:, None, None, :] if padded else True)
    np.testing.assert_array_equal(
        np.broadcast_to(found.numpy(), (2, 1, new, past + new)),
        np.broadcast_to(expected, (2, 1, new, past + new)),
    )


def test_the_mask_that_transformers_makes_without_vmap_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(batch_size: int, use_vmap: bool = False) -> None: ...

    monkeypatch.setattr(masking_utils, "sdpa_mask", own)
    assert growing_mask() is own


@pytest.mark.parametrize(("cap", "attention"), [(2.0, "eager"), (None, "sdpa")])
def test_scores_are_capped_where_the_configuration_says_so(cap: float | None, attention: str) -> None:
    """transformers 4 loads Gemma 2 with PyTorch's attention, which knows no cap."""
    config = Gemma2Config(attn_logit_softcapping=cap)
    config._attn_implementation = "sdpa"

    class Model:
        def __init__(self) -> None:
            self.config = config

        def set_attn_implementation(self, name: str) -> None:
            self.config._attn_implementation = name

    model = Model()
    enable_softcapping(model)
    assert model.config._attn_implementation == attention


def test_a_saved_tokenizer_is_one_that_both_major_versions_know(tiny_folder: Path, tmp_path: Path) -> None:
    """tests/test_docs_commands.py has 4.57 read one."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    files = save_tokenizer(tokenizer, tmp_path)
    assert set(files) == set(tmp_path.iterdir())
    told = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert told["model_input_names"] == ["input_ids", "attention_mask"]
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "Once upon a time, 123 <unknown>"
    assert again(text) == tokenizer(text) and again.eos_token_id == tokenizer.eos_token_id
