"""The form of an encoder's graph: inputs, outputs and sizes as onnx reads them, and the numbers of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModel

from nbl_export.export.forms import encoder_form
from nbl_export.export.torch import export_torch
from nbl_export.models.forward import SENTENCE
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.tasks import Pooling, task_named
from tests.encoders import IMAGE_TOKENS, PAD, WIDTH, text_encoder, vision_encoder
from tests.sessions import run_graph

FEATURES = task_named("feature-extraction")
IDS = np.array([[257, 20, 30, 40, 258], [257, 50, 258, PAD, PAD]])
TEXT = {
    "input_ids": IDS,
    "attention_mask": (IDS != PAD).astype(np.int64),
    "token_type_ids": np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]),
}
PIXELS = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}


def exported(folder: Path, target: Path, inputs: Any, pooling: Pooling | None) -> onnx.ModelProto:
    model = load_model(find_model(str(folder)))
    export_torch(model, target, form=encoder_form(model, FEATURES, pooling, inputs))
    return onnx.load(str(target), load_external_data=False)


def dims(values: Any) -> dict[str, tuple[str | int, ...]]:
    return {v.name: tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def test_text_goes_in_by_three_names_and_comes_out_as_states_and_a_sentence(
    bert: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    proto = exported(bert, path, TEXT, Pooling("mean", False, ()))
    assert dims(proto.graph.input) == dict.fromkeys(TEXT, ("batch_size", "sequence_length"))
    assert list(dims(proto.graph.input)) == list(TEXT)
    found = dims(proto.graph.output)
    assert found["last_hidden_state"] == ("batch_size", "sequence_length", WIDTH)
    assert found[SENTENCE] == ("batch_size", WIDTH)
    assert {o.version for o in proto.opset_import if o.domain == ""} == {23}
    with torch.inference_mode():
        states = AutoModel.from_pretrained(bert)(**{n: torch.from_numpy(a) for n, a in TEXT.items()})
    expected, mask = states.last_hidden_state.double().numpy(), TEXT["attention_mask"].astype(bool)
    outputs = run_graph(path, TEXT)
    np.testing.assert_allclose(outputs["last_hidden_state"][mask], expected[mask], rtol=0, atol=1e-4)
    means = np.array([expected[i][mask[i]].mean(0) for i in range(2)])
    np.testing.assert_allclose(outputs[SENTENCE], means, rtol=0, atol=1e-4)
    # One row, longer than any that was traced.
    one = {n: np.concatenate([a[:1], a[:1]], axis=1) for n, a in TEXT.items()}
    assert run_graph(path, one)["last_hidden_state"].shape == (1, 10, WIDTH)


def test_images_are_of_one_size_and_of_any_number(tmp_path: Path) -> None:
    folder, path = vision_encoder(tmp_path / "vit"), tmp_path / "model.onnx"
    proto = exported(folder, path, PIXELS, None)
    assert dims(proto.graph.input) == {"pixel_values": ("batch_size", 3, 32, 32)}
    with torch.inference_mode():
        states = AutoModel.from_pretrained(folder)(torch.from_numpy(PIXELS["pixel_values"])).last_hidden_state
    found = run_graph(path, PIXELS)["last_hidden_state"]
    np.testing.assert_allclose(found, states.numpy(), rtol=0, atol=1e-4)
    three = {"pixel_values": np.concatenate([PIXELS["pixel_values"]] * 2)[:3]}
    assert run_graph(path, three)["last_hidden_state"].shape == (3, IMAGE_TOKENS, WIDTH)
