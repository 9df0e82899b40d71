"""onnxruntime-genai generates from our folder, token for token what our own decode loop gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nbl_export import api
from nbl_export.runtime.ort import OrtDecoder

PROMPT = [1, 403, 407, 261, 378]  # "<s> Once upon a time"


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    decoder = OrtDecoder(path, rounded=False)  # as genai runs it
    past, ids = decoder.empty_past(1), np.array([prompt], dtype=np.int64)
    positions, tokens = np.arange(len(prompt))[None], []
    for _ in range(count):
        length = int(positions[0, -1]) + 1
        output = decoder(ids, np.ones((1, length), dtype=np.int64), positions, past)
        past = output.present
        tokens.append(int(output.logits[0, -1].argmax()))
        ids, positions = np.array([[tokens[-1]]], dtype=np.int64), np.array([[length]])
    return tokens


@pytest.mark.client
@pytest.mark.parametrize("folder", ["", "baseline"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_genai_generates_what_our_decoder_does(stories_copy: Path, folder: str, precision: str) -> None:
    if precision != "fp32":
        api.export(stories_copy, api.ExportSettings(precision))
        api.rewrite(stories_copy)
    genai = pytest.importorskip(
        "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
    )
    model = genai.Model(str(stories_copy / folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + 24, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(PROMPT)
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    assert len(tokens) == 24
    assert tokens == greedy(stories_copy / folder / "model.onnx", PROMPT, 24)
