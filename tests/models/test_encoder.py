"""An encoder as a function: its outputs in the order of its task, and pooled as NumPy pools in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from nbl_export.models.encoder import INPUT_ORDER, SENTENCE, encoder_of, encoder_outputs
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.tasks import Pooling, task_named
from tests.encoders import IMAGE_TOKENS, PAD, VOCAB, WIDTH, text_encoder, vision_encoder

IDS = np.array([[257, 20, 30, 40, 258], [257, 50, 258, PAD, PAD]])
INPUTS = {
    "token_type_ids": np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]]),
    "attention_mask": (IDS != PAD).astype(np.int64),
    "input_ids": IDS,
}
FEATURES = task_named("feature-extraction")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoder(tmp_path_factory.mktemp("encoder") / "bert")


def theirs(folder: Path, inputs: Any) -> Any:
    with torch.inference_mode():
        return AutoModel.from_pretrained(folder)(**{n: torch.from_numpy(a) for n, a in inputs.items()})


@pytest.mark.parametrize("mode", ["mean", "cls", "max"])
def test_states_and_the_sentence_are_those_of_transformers_and_numpy(bert: Path, mode: str) -> None:
    model = load_model(find_model(str(bert)))
    encoder = encoder_of(model, FEATURES, Pooling(mode, True, ()), INPUTS)  # type: ignore[arg-type]
    # By position, in one order whatever the batch's.
    assert encoder.inputs == ("input_ids", "attention_mask", "token_type_ids")
    with torch.inference_mode():
        found = dict(
            zip(encoder.outputs, encoder(*(torch.from_numpy(INPUTS[n]) for n in encoder.inputs)), strict=True)
        )
    states = theirs(bert, INPUTS).last_hidden_state.double().numpy()
    mask = INPUTS["attention_mask"].astype(bool)
    np.testing.assert_allclose(found["last_hidden_state"].numpy()[mask], states[mask], rtol=0, atol=1e-5)
    rows = [states[i][mask[i]] for i in range(2)]
    pooled = np.array([{"mean": r.mean(0), "cls": r[0], "max": r.max(0)}[mode] for r in rows])
    expected = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(found[SENTENCE].numpy(), expected, rtol=0, atol=1e-5)


def test_outputs_are_what_the_model_gives_of_its_task(bert: Path, tmp_path: Path) -> None:
    model = load_model(find_model(str(bert)))
    names = {"last_hidden_state": ("batch_size", "sequence_length"), "pooler_output": ("batch_size",)}
    assert {n: d[: len(names[n])] for n, d in encoder_outputs(model, FEATURES, None).items()} == names
    pooled = encoder_outputs(model, FEATURES, Pooling("cls", False, ()))
    assert set(pooled) == {*names, SENTENCE} and pooled[SENTENCE] == ("batch_size",)
    folder = text_encoder(tmp_path / "masked", "bert", "BertForMaskedLM")
    source = find_model(str(folder))
    found = encoder_outputs(load_model(source), task_named(source.task), None)
    assert list(found) == ["logits"]


def test_an_image_is_the_only_input_of_its_encoder(tmp_path: Path) -> None:
    folder = vision_encoder(tmp_path / "vit")
    pixels = {"pixel_values": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}
    encoder = encoder_of(load_model(find_model(str(folder))), FEATURES, None, pixels)
    assert encoder.inputs == ("pixel_values",)
    with torch.inference_mode():
        found = dict(zip(encoder.outputs, encoder(torch.from_numpy(pixels["pixel_values"])), strict=True))
    states = found["last_hidden_state"]
    assert states.shape == (2, IMAGE_TOKENS, WIDTH)
    torch.testing.assert_close(states, theirs(folder, pixels).last_hidden_state, rtol=0, atol=1e-5)


def test_rotary_encoders_get_a_row_of_positions_each(tmp_path: Path) -> None:
    """Left to themselves they make one row for all, which ONNX's RotaryEmbedding does not take."""
    fields = {"global_attn_every_n_layers": 2, "local_attention": 8, "vocab_size": VOCAB, "pad_token_id": PAD}
    folder = text_encoder(tmp_path / "modern", "modernbert", "ModernBertModel", **fields)
    model: Any = load_model(find_model(str(folder)))
    given = {name: INPUTS[name] for name in ("input_ids", "attention_mask")}
    encoder = encoder_of(model, FEATURES, None, given)
    seen: list[Any] = []
    rotary = next(m for m in model.modules() if "rotary" in type(m).__name__.lower())

    def note(_module: Any, args: Any, kwargs: Any) -> None:
        given = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        seen.extend(a for a in given if not a.is_floating_point())

    hook = rotary.register_forward_pre_hook(note, with_kwargs=True)
    with torch.inference_mode():
        (states, *_) = encoder(*(torch.from_numpy(given[n]) for n in encoder.inputs))
    hook.remove()
    assert seen and seen[0].tolist() == [list(range(5))] * 2
    mask = torch.from_numpy(given["attention_mask"]).bool()
    expected = theirs(folder, given).last_hidden_state
    torch.testing.assert_close(states[mask], expected[mask], rtol=0, atol=1e-4)


def test_the_order_of_inputs_is_the_one_that_graphs_have() -> None:
    assert INPUT_ORDER == ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
