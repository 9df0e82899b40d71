"""The language models inside multimodal checkpoints: found, loaded without the towers, and right.

What is held against: transformers' own wrapper with all its towers, and the same weights as a plain text model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nbl_export.calibrate.collect import collect_moments
from tests.families import VOCAB, Calibrated, attention_share
from tests.fixtures_graph import load
from tests.multimodal import SERVED, WRAPPERS, whole

# Those that have a class for their text alone, which transformers' own wrapper need not have.
PLAIN = [name for name in WRAPPERS if not name.startswith(("qwen", "glm", "phi4", "gemma3n"))]


def own(name: str) -> Any:
    """transformers' model with all its towers; of Llama 4, whose wrapper fails without an image, what is inside."""
    model = whole(name)
    return model.language_model if name == "llama4" else model


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_logits_are_the_wrappers(name: str, wrapper_folder: Callable[[str], Path]) -> None:
    ids = torch.from_numpy(np.random.default_rng(5).integers(3, VOCAB - 10, (2, 24)))
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        expected = own(name)(input_ids=ids, attention_mask=mask).logits
        found = load(wrapper_folder(name))(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SERVED)
def test_attention_matters(name: str, wrapper: Callable[[str], Calibrated]) -> None:
    without, linear = attention_share(wrapper(name))
    assert without > 0.2
    assert linear > 0.01


@pytest.mark.parametrize("name", PLAIN)
def test_the_moments_are_those_of_the_plain_text_model(
    name: str, wrapper: Callable[[str], Calibrated]
) -> None:
    case = wrapper(name)
    plain = (
        AutoModelForCausalLM.from_config(case.model.config, dtype=torch.float32).eval().requires_grad_(False)
    )
    language: Any = own(name)
    for part in ("model", "language_model", "text_model"):
        language = getattr(language, part, language)
    plain.model.load_state_dict(language.state_dict())
    tokens = np.random.default_rng(0).integers(3, case.model.config.vocab_size, (64, 32), dtype=np.int32)
    expected = collect_moments(plain, tokens)
    for index, layer in expected.layers.items():
        np.testing.assert_array_equal(case.moments.layers[index].xx, layer.xx)
        np.testing.assert_array_equal(case.moments.layers[index].yx, layer.yx)
