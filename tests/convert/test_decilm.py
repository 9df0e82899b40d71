"""The folder for readers of DeciLM: names, no biases, and a configuration that transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig

from nbl_export.blocks import Block, Mlp
from nbl_export.convert.decilm import IN_MLX, check_held, write_decilm
from nbl_export.errors import InputError
from nbl_export.linearize.plan import DROPPED, LinearLayer, Plan
from nbl_export.progress import Silent
from nbl_export.runtime.mlx import MlxStream
from nbl_export.stages.forms import DeciLm
from tests.convert.test_mlx import NoTokenizer
from tests.converting import WRONG, assert_as_in_pytorch, needs, stream_parity, wrongly
from tests.tiny_types import tiny_model

RandomPlan = Callable[[Any, Sequence[Block]], Plan]


def no_bias(plan: Plan) -> Plan:
    layers = {block: LinearLayer(one.w, np.zeros_like(one.b)) for block, one in plan.layers.items()}
    return replace(plan, layers=layers)


def test_names_and_configuration_are_those_of_its_readers(
    tmp_path: Path, random_plan: RandomPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    plan = no_bias(random_plan(model, [0, Mlp(1)]))
    plan = plan.with_replaced({**plan.layers, 2: DROPPED})
    files = write_decilm(tmp_path, model, plan, NoTokenizer(), "bfloat16", Silent())
    assert files[-1].name == "config.json" and all(path.is_file() for path in files)
    write_decilm(tmp_path, model, plan, NoTokenizer(), "float32", Silent())
    found = load_file(tmp_path / "model-00001.safetensors")
    assert np.array_equal(found["model.layers.0.self_attn.linear_attn.weight"], plan.layers[0].w)
    assert np.array_equal(found["model.layers.1.mlp.linear_mlp.weight"], plan.layers[Mlp(1)].w)
    assert not [name for name in found if name.endswith("bias")]
    assert not [name for name in found if name.startswith("model.layers.2.self_attn")]
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert (config.model_type, config.architectures) == ("nemotron-nas", ["DeciLMForCausalLM"])
    first, second, last = config.block_configs
    assert first.attention.replace_with_linear and first.attention.n_heads_in_group is None
    assert second.attention.n_heads_in_group == 2 and not second.attention.no_op
    assert second.ffn.replace_with_linear and last.attention.no_op and last.ffn.ffn_mult == 12.0
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.block_configs == config.block_configs


@needs(DeciLm)
def test_it_computes_what_pytorch_does(tmp_path: Path, random_plan: RandomPlan) -> None:
    """In mlx-lm, which has the same form by other names."""
    model = tiny_model("llama", num_hidden_layers=4)
    plan = no_bias(random_plan(model, [0, 2, Mlp(3)]))
    write_decilm(tmp_path / "own", model, plan, NoTokenizer(), "float32", Silent())
    assert_as_in_pytorch(lambda: MlxStream(tmp_path / "own", IN_MLX), model, plan)
    for change in set(WRONG) - {"no bias"}:
        write_decilm(tmp_path / change, model, wrongly(change, plan), NoTokenizer(), "float32", Silent())
        assert stream_parity(MlxStream(tmp_path / change, IN_MLX), model, plan).failures() != []


def test_what_it_cannot_hold_is_refused(tmp_path: Path, random_plan: RandomPlan) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="Layer 1 has a bias, and DeciLM has none: take it into W first"):
        write_decilm(tmp_path / "a", model, random_plan(model, [1]), NoTokenizer(), "float32", Silent())
    biased = tiny_model("qwen2")
    with pytest.raises(
        InputError, match=r"DeciLM has no biases, and Qwen2ForCausalLM has model\.layers\.0\."
    ):
        check_held(biased, random_plan(biased, [1]))
    with pytest.raises(InputError, match="models like Llama alone"):
        check_held(tiny_model("gemma2"), random_plan(tiny_model("gemma2"), [1]))
    assert not (tmp_path / "a").exists()
