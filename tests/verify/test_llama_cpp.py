"""Tokens and the size of the cache are checked, too: each check fails for what is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nbl_export.verify.converted import check_tokens
from nbl_export.verify.llama_cpp import _cache_check


def case(layers: tuple[int, ...]) -> Any:
    config = SimpleNamespace(hidden_size=64, num_attention_heads=8, num_key_value_heads=4)
    return SimpleNamespace(
        model=SimpleNamespace(config=config),
        plan=SimpleNamespace(attention_layers=layers),
        text=SimpleNamespace(heldout=np.arange(300, 340)[None]),
    )


@pytest.mark.parametrize(
    ("layers", "status"), [((0, 1, 3), "passed"), ((0, 1, 2, 3), "failed"), ((0,), "failed")]
)
def test_a_cache_of_other_layers_is_seen(layers: tuple[int, ...], status: str) -> None:
    stream = SimpleNamespace(cache_bytes=3 * 2 * 4 * 8 * 4 * 512, slots=512)
    found = _cache_check(case(layers), stream)  # type: ignore[arg-type]
    assert found.status == status


@pytest.mark.parametrize("wrong", [None, 5, -1])
def test_another_token_is_seen_and_named(stories_folder: Path, wrong: int | None) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(stories_folder)

    def tokenize(text: str) -> list[int]:
        own = list(tokenizer(text).input_ids)
        if wrong == -1:
            return own[:-1]
        return own if wrong is None else [*own[:wrong], 7, *own[wrong + 1 :]]

    found = check_tokens(case(()), tokenizer, tokenize, "llama.cpp")
    assert found.status == ("passed" if wrong is None else "failed")
    if wrong == 5:
        assert found.detail.startswith("token 5 of held-out text is [7] in llama.cpp")
