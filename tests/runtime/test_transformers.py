"""Linearized models in transformers against PyTorch with the plan, with their caches, and folders that are wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbl_export.blocks import Block, Mlp, Span
from nbl_export.convert.hf import write_hf
from nbl_export.errors import BuildError
from nbl_export.linearize.plan import Plan
from nbl_export.models.registered import TYPES
from nbl_export.progress import Silent
from nbl_export.runtime.transformers import TransformersStream
from nbl_export.verify.parity.figures import Parity
from tests.convert.test_mlx import NoTokenizer
from tests.converting import WRONG, assert_as_in_pytorch, stream_parity, wrongly
from tests.tiny_types import tiny_model

RandomPlan = Callable[[Any, Sequence[Block]], Plan]
CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},  # of every layer, and shorter than the rows
    "gemma": {"num_key_value_heads": 2, "head_dim": 8},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": True},
}
# The first attention, whose place in a cache tells the length of a text, in some of them.
BLOCKS: tuple[tuple[Block, ...], ...] = ((0, 2, Mlp(3)), (Span(1, 2),), (0, 1), (3, Mlp(0)))


def parity(path: Path, model: Any, plan: Plan) -> Parity:
    return stream_parity(TransformersStream(path), model, plan)


def written(path: Path, model: Any, plan: Plan) -> Path:
    write_hf(path, model, plan, NoTokenizer(), "float32", Silent())
    return path


@pytest.mark.parametrize("model_type", TYPES)
def test_every_type_and_form_of_a_layer(model_type: str, tmp_path: Path, random_plan: RandomPlan) -> None:
    model = tiny_model(model_type, num_hidden_layers=4, **CHANGES.get(model_type, {}))
    plan = random_plan(model, BLOCKS[TYPES.index(model_type) % len(BLOCKS)])
    written(tmp_path, model, plan)
    assert_as_in_pytorch(lambda: TransformersStream(tmp_path), model, plan)


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_folder_is_seen(change: str, tmp_path: Path, random_plan: RandomPlan) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    plan = random_plan(model, [0, 2])
    assert parity(written(tmp_path, model, wrongly(change, plan)), model, plan).failures() != []


def test_a_weight_that_is_missing_is_said(tmp_path: Path, random_plan: RandomPlan) -> None:
    """transformers makes one up."""
    model = tiny_model("llama", num_hidden_layers=4)
    config = written(tmp_path, model, random_plan(model, [2])) / "config.json"
    raw = json.loads(config.read_text())
    raw["nbl"]["modules"]["model.layers.1.self_attn"] = {"linear": True, "returns": 2}
    config.write_text(json.dumps(raw))
    with pytest.raises(BuildError, match=r"does not find every weight of .*: model\.layers\.1\.self_attn\."):
        TransformersStream(tmp_path)
