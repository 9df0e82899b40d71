"""Our own decode loop, what other projects' must give, token for token; and that of onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.runtime.ort import OrtModel


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """The ``count`` likeliest tokens after ``prompt``, one after the other, from the graph at ``path``."""
    decoder = OrtModel(path, rounded=False)  # as others run it
    past, ids = decoder.empty_past(1), np.array([prompt], dtype=np.int64)
    positions, tokens = np.arange(len(prompt))[None], []
    for _ in range(count):
        length = int(positions[0, -1]) + 1
        output = decoder(ids, np.ones((1, length), dtype=np.int64), positions, past)
        past = output.present
        tokens.append(int(output.logits[0, -1].argmax()))
        ids, positions = np.array([[tokens[-1]]], dtype=np.int64), np.array([[length]])
    return tokens


def by_genai(
    folder: Path, prompt: list[int], count: int, inputs: Mapping[str, Any] | None = None, ends: bool = False
) -> list[int]:
    """``count`` tokens by onnxruntime-genai, or fewer where a text ``ends``; ``inputs`` beside the ids."""
    genai = pytest.importorskip(
        "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
    )
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = len(prompt) + count
    parameters.set_search_options(
        max_length=length, do_sample=False, **({} if ends else {"min_length": length})
    )
    generator = genai.Generator(model, parameters)
    if inputs is None:
        generator.append_tokens(np.array([prompt], dtype=np.int32))
    else:
        named = genai.NamedTensors()
        for name, array in {"input_ids": np.array([prompt], dtype=np.int32), **inputs}.items():
            named[name] = array
        generator.set_inputs(named)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]
