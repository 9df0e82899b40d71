"""Which models other engines take, how their rotary embeddings are said, and weights in files of a size."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from nbl_export.blocks import Block
from nbl_export.convert import llama
from nbl_export.convert.llama import Shards, check_like_llama, numbers, rope_base, rope_factors
from nbl_export.errors import InputError
from nbl_export.linearize.adapters import Adapter
from nbl_export.linearize.plan import Plan
from tests.tiny_types import tiny_model

RandomPlan = Callable[[Any, Sequence[Block]], Plan]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma2", {}, "Gemma2ForCausalLM (gemma2) is none: convert takes llama, mistral, qwen2."),
        ("llama", {"hidden_act": "gelu"}, "gates with SiLU, and LlamaForCausalLM (llama) with gelu."),
        ("mistral", {"sliding_window": 8}, "MistralForCausalLM (mistral) has a sliding window"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "Qwen2ForCausalLM (qwen2) has a sliding window",
        ),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "of the kind 'dynamic'"),
    ],
)
def test_a_model_that_the_architecture_does_not_have(
    kind: str, changes: dict[str, Any], message: str, random_plan: RandomPlan
) -> None:
    model = tiny_model(kind, **changes)
    with pytest.raises(InputError) as refused:
        check_like_llama(model, random_plan(model, [1]), "llama.cpp")
    assert message in str(refused.value)


def test_a_plan_that_reads_the_residual_stream(random_plan: RandomPlan) -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="select again without --fit-input residual"):
        check_like_llama(model, replace(random_plan(model, [1]), fit_input="residual"), "mlx-lm")


def test_frequencies_are_divided_as_the_model_divides_them() -> None:
    assert rope_factors(tiny_model("llama")) is None
    asked = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_model("llama", rope_scaling={**asked, "original_max_position_embeddings": 32})
    factors = rope_factors(model)
    assert factors is not None and factors.max() > 1.5
    head: int = model.config.hidden_size // model.config.num_attention_heads
    plain = rope_base(model) ** (-np.arange(0, head, 2) / head)
    torch.testing.assert_close(
        torch.from_numpy(plain).float() / factors, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=1e-7
    )


def test_what_a_repair_changed_is_in_the_numbers(random_plan: RandomPlan) -> None:
    model, name = tiny_model("llama"), "model.layers.0.mlp.up_proj.weight"
    own = model.get_parameter(name).numpy()
    change = Adapter(np.ones((own.shape[0], 1), np.float32), np.full((1, own.shape[1]), 0.5, np.float32), ())
    plan = replace(random_plan(model, [1]), adapters={name: change})
    assert np.array_equal(numbers(model, plan, name), own + 0.5)
    assert np.array_equal(
        numbers(model, plan, "model.norm.weight"), model.get_parameter("model.norm.weight").numpy()
    )


def test_weights_are_in_files_of_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "_SHARD", 1000)
    files = Shards(tmp_path, "float16", "pt")
    own = {f"w{i}": np.full((10, 20), i, np.float32) for i in range(5)}  # 400 bytes each
    for name, value in own.items():
        files.add(name, value)
    *paths, index = files.finish()
    assert [path.name for path in paths] == [f"model-0000{n}.safetensors" for n in (1, 2, 3)]
    raw = json.loads(index.read_text())
    assert raw["metadata"] == {"total_size": 2000}
    found = {}
    for path in paths:
        tensors = load_file(path)
        assert {name for name, place in raw["weight_map"].items() if place == path.name} == set(tensors)
        with safe_open(path, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
        found |= tensors
    assert found.keys() == own.keys()
    assert all(found[n].dtype == np.float16 and np.array_equal(found[n], own[n]) for n in own)


def test_a_number_that_the_dtype_does_not_have_is_refused(tmp_path: Path) -> None:
    files = Shards(tmp_path, "float16", "pt")
    with pytest.raises(InputError, match="w has numbers that float16 does not have: use --precision bf16"):
        files.add("w", np.array([1e6], np.float32))
    assert not list(tmp_path.iterdir())
