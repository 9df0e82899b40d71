"""Models and plans in mlx-lm against PyTorch, with their caches, and folders that are wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from nbl_export.blocks import Block, Mlp, Span
from nbl_export.convert.mlx import write_mlx
from nbl_export.linearize.plan import Plan
from nbl_export.progress import Silent
from nbl_export.runtime.mlx import MlxStream
from nbl_export.stages.forms import Mlx
from nbl_export.verify.parity.figures import Parity
from tests.convert.test_mlx import NoTokenizer
from tests.converting import WRONG, assert_as_in_pytorch, needs, stream_parity, wrongly
from tests.runtime.test_llama_cpp import LLAMA3
from tests.tiny_types import tiny_model

pytestmark = needs(Mlx)
RandomPlan = Callable[[Any, Sequence[Block]], Plan]
MODELS: dict[str, tuple[str, dict[str, Any], tuple[Block, ...]]] = {
    "llama": ("llama", {}, (0, 2, Mlp(3))),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, (1,)),
    "tied": ("llama", {"tie_word_embeddings": True}, (1,)),
    "llama3 rope": (
        "llama",
        {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
        (1, Mlp(1)),
    ),
    "mistral": ("mistral", {"sliding_window": None}, (Span(1, 2),)),
    "qwen2": ("qwen2", {}, (0, 2)),
}


def parity(path: Path, model: Any, plan: Plan) -> Parity:
    return stream_parity(MlxStream(path), model, plan)


@pytest.mark.parametrize("name", MODELS)
def test_every_form_of_a_layer(name: str, tmp_path: Path, random_plan: RandomPlan) -> None:
    kind, changes, blocks = MODELS[name]
    model = tiny_model(kind, num_hidden_layers=4, **changes)
    plan = random_plan(model, blocks)
    write_mlx(tmp_path, model, plan, NoTokenizer(), "float32", Silent())
    assert_as_in_pytorch(lambda: MlxStream(tmp_path), model, plan)


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_folder_is_seen(change: str, tmp_path: Path, random_plan: RandomPlan) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    plan = random_plan(model, [0, 2])
    write_mlx(tmp_path, model, wrongly(change, plan), NoTokenizer(), "float32", Silent())
    assert parity(tmp_path, model, plan).failures() != []
