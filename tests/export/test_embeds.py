"""Decoders that read embeddings: the logits are those of token ids, and positions have rows where a model has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from nbl_export.blocks import Block, Mlp
from nbl_export.errors import InputError
from nbl_export.export.checks import check_form
from nbl_export.export.embeds import embedding_form, reading_embeds
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import export_torch
from nbl_export.graph.embedding import NAME
from nbl_export.models import forward
from nbl_export.rewrite.replace import rewrite_file
from tests.end_to_end.matrix import CHOSEN, parity
from tests.families import LAYERS, WIDTH, Calibrated
from tests.multimodal import WRAPPERS

ALL = (0, 1, 2, 3)
WHICH = [
    ("gemma3", "concat", (Mlp(0), 1, Mlp(2), 3)),  # whose embedding is scaled
    ("qwen2.5-vl", "concat", (1, 3)),
    ("qwen2.5-vl", "static", (*ALL, *map(Mlp, ALL))),
    ("llava", "shared", (1, 3)),
    ("llava", "none", CHOSEN["one"]),
    ("gemma3n", "concat", (2,)),
    ("gemma4", "static", (2, 3)),
    ("gpt_neox", "concat", (0, Mlp(0))),  # both read what the embedding gives
]


def exported(model: torch.nn.Module, form: str, folder: Path) -> Path:
    """The decoder of ``model`` in ``folder`` with its embedding beside it."""
    reads = reading_embeds(FORMS[form], model)
    check_form(model, reads)
    export_torch(model, folder / NAME, form=embedding_form(model))
    export_torch(model, folder / "baseline" / "model.onnx", form=reads)
    return folder / "baseline" / "model.onnx"


def inputs_of(path: Path) -> dict[str, list[object]]:
    graph = onnx.load(str(path), load_external_data=False).graph
    return {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}


@pytest.mark.parametrize(("name", "form", "layers"), WHICH)
def test_a_decoder_of_embeddings_is_the_model(
    name: str,
    form: str,
    layers: tuple[Block, ...],
    wrapper: Callable[[str], Calibrated],
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
) -> None:
    """Ragged prefill and decode of the rewritten graph, by token ids that its embedding embeds."""
    case = wrapper(name) if name in WRAPPERS else calibrated_of(name)
    (tmp_path / "baseline").mkdir()
    source = exported(case.model, form, tmp_path)
    plan = case.plan(layers)
    rewrite_file(source, plan, tmp_path / "model.onnx")
    assert parity(case.model, plan, tmp_path / "model.onnx").failures() == []

    names = inputs_of(tmp_path / "model.onnx")
    assert names["inputs_embeds"] == ["batch_size", "sequence_length", WIDTH] and "input_ids" not in names
    rows = [3] if name.startswith("qwen") else []
    assert names["position_ids"] == [*rows, "batch_size", "sequence_length"]


def test_rows_of_positions_that_differ_are_the_models(
    wrapper: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    """As for an image, whose patches have one time and many places; every row matters."""
    model = wrapper("qwen2.5-vl").model
    (tmp_path / "baseline").mkdir()
    session = ort.InferenceSession(str(exported(model, "none", tmp_path)))
    numbers = np.random.default_rng(0)
    embeds = numbers.standard_normal((2, 12, WIDTH)).astype(np.float32) * 0.1
    positions = np.cumsum(numbers.integers(0, 3, (3, 2, 12)), axis=-1)

    def of_graph(rows: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        feeds = {"inputs_embeds": embeds, "position_ids": rows, "attention_mask": np.ones((2, 12), np.int64)}
        names = [i.name for i in session.get_inputs()]
        scalars = {"num_logits_to_keep": np.array(0)} if "num_logits_to_keep" in names else {}
        return np.asarray(session.run(["logits"], {**feeds, **scalars})[0])

    with torch.inference_mode():
        expected = model(
            inputs_embeds=torch.from_numpy(embeds), position_ids=torch.from_numpy(positions), use_cache=False
        ).logits.numpy()
    found = of_graph(positions)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    for row in range(3):
        other = positions.copy()
        other[row] += np.arange(12)
        assert np.abs(of_graph(other) - found).max() > 1e-3


def test_a_model_with_another_table_of_token_ids_is_refused(
    wrapper: Callable[[str], Calibrated], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As embeddings of each layer, of a model that is not given them."""
    monkeypatch.setattr(forward, "has_per_layer", lambda _body: False)
    with pytest.raises(InputError) as caught:
        reading_embeds(FORMS["concat"], wrapper("gemma4").model)
    assert "looks up token ids in 2 tables (model.embed_tokens, model.embed_tokens_per_layer)" in str(
        caught.value
    )
    assert len(ALL) == LAYERS
