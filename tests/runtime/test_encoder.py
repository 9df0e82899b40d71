"""Encoders in PyTorch and ONNX Runtime: each gives what transformers gives, by the names of their outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from nbl_export.errors import InputError
from nbl_export.export.forms import encoder_form
from nbl_export.export.torch import export_torch
from nbl_export.models.encoder import encoder_of
from nbl_export.models.load import in_precision, load_model
from nbl_export.models.source import find_model
from nbl_export.models.tasks import task_named
from nbl_export.runtime.ort import OrtEncoder
from nbl_export.runtime.torch import TorchEncoder
from tests.encoders import PAD, text_encoder, vision_encoder

FEATURES = task_named("feature-extraction")
IDS = np.array([[257, 20, 30, 40, 258], [257, 50, 258, PAD, PAD]])
MASK = (IDS != PAD).astype(np.int64)
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": np.zeros_like(IDS)}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def graph(bert: Path) -> Path:
    model = load_model(find_model(str(bert)))
    path = bert.with_name("model.onnx")
    export_torch(model, path, form=encoder_form(model, FEATURES, None, INPUTS))
    return path


def states(folder: Path, inputs: Any) -> Any:
    with torch.inference_mode():
        output = AutoModel.from_pretrained(folder)(**{n: torch.from_numpy(a) for n, a in inputs.items()})
    return output.last_hidden_state.numpy()


@pytest.mark.parametrize("of", ["pytorch", "onnxruntime"])
def test_every_row_is_the_row_without_its_padding(bert: Path, graph: Path, of: str) -> None:
    model = load_model(find_model(str(bert)))
    encoder: Any = (
        TorchEncoder(encoder_of(model, FEATURES, None, INPUTS)) if of == "pytorch" else OrtEncoder(graph)
    )
    # More than it takes, in another order: by name.
    found = encoder({"position_ids": IDS, **dict(reversed(INPUTS.items()))})
    assert set(found) == {"last_hidden_state", "pooler_output"}
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    for i, length in enumerate(MASK.sum(axis=1)):
        alone = {name: array[i : i + 1, :length] for name, array in INPUTS.items()}
        np.testing.assert_allclose(
            found["last_hidden_state"][i, :length], states(bert, alone)[0], rtol=0, atol=1e-4
        )


def test_half_precision_is_read_in_half_and_told_in_float32(tmp_path: Path) -> None:
    folder = vision_encoder(tmp_path / "vit")
    model = load_model(find_model(str(folder)))
    pixels = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
    half = in_precision(model, "bfloat16")
    found = TorchEncoder(encoder_of(half, FEATURES, None, pixels))(pixels)["last_hidden_state"]
    exact = states(folder, pixels)
    assert found.dtype == np.float32 and np.array_equal(
        found, torch.from_numpy(found).bfloat16().float().numpy()
    )
    error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.05
    # A slice of a larger batch, whose memory is not in one piece, is the same.
    wide = np.stack([pixels["pixel_values"]] * 2, axis=-1)[..., 0]
    assert not wide.flags["C_CONTIGUOUS"]
    again = TorchEncoder(encoder_of(half, FEATURES, None, pixels))({"pixel_values": wide})
    assert np.array_equal(again["last_hidden_state"], found)


def test_a_graph_that_does_not_take_a_batch_says_so_in_one_sentence(graph: Path) -> None:
    short = {**INPUTS, "attention_mask": MASK[:, :3]}
    with pytest.raises(InputError, match=r"^onnxruntime does not run the graph: ") as told:
        OrtEncoder(graph)(short)
    assert "\n" not in str(told.value)
