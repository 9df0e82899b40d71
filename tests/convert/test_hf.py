"""The folder for transformers, as its users load it: with remote code, registered, generating, saved, trained."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import CONFIG_MAPPING

from nbl_export.blocks import Block, Mlp
from nbl_export.convert.folders import hf_configuration, write_hf
from nbl_export.errors import InputError
from nbl_export.linearize.plan import DROPPED, Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.modeling_nbl import PREFIX, TYPES, LinearBlock, Linearized, classes_of
from nbl_export.progress import Silent
from tests.convert.test_mlx import NoTokenizer
from tests.tiny_types import tiny_model

RandomPlan = Callable[[Any, Sequence[Block]], Plan]
PROMPT = torch.tensor([[7, 8, 9, 10, 11]])


@pytest.fixture
def model() -> Any:
    return tiny_model("llama", num_hidden_layers=4)


@pytest.fixture
def folder(model: Any, tmp_path: Path, random_plan: RandomPlan) -> Path:
    """Of a model whose first attention is linear."""
    write_hf(tmp_path / "hf", model, random_plan(model, [0, 2]), NoTokenizer(), "float32", Silent())
    return tmp_path / "hf"


def loaded(folder: Path) -> Any:
    import transformers

    import nbl_export.transformers  # noqa: F401

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def elsewhere(folder: Path, tmp_path: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The folder in a process without nbl-export: the tokens that it generates, and the layers of its cache."""
    code = (
        "import sys, torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}, **{options!r}).eval()\n"
        f"out = model.generate(torch.tensor({PROMPT.tolist()}), max_new_tokens=12, do_sample=False,\n"
        "    return_dict_in_generate=True)\n"
        "assert not any(name.startswith('nbl_export') for name in sys.modules)\n"
        "print(out.sequences[0].tolist(), sum(bool(one.get_seq_length()) for one in out.past_key_values.layers))\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )


def by_whole_passes(model: Any, plan: Plan, count: int) -> list[int]:
    """Greedy tokens without a cache: all of the text goes through PyTorch with the plan for each."""
    ids = PROMPT
    with torch.inference_mode(), linearized(model, plan):
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    tokens: list[int] = ids[0].tolist()
    return tokens


def test_it_generates_with_remote_code_and_registered(
    model: Any, folder: Path, tmp_path: Path, random_plan: RandomPlan
) -> None:
    expected = by_whole_passes(model, random_plan(model, [0, 2]), 12)
    assert len(set(expected[5:])) > 2, "a loop would say little"
    assert json.loads((folder / "config.json").read_text())["model_type"] == "nbl_llama"
    model = loaded(folder)
    assert model.generate(PROMPT, max_new_tokens=12, do_sample=False)[0].tolist() == expected
    # What is saved of it is such a folder, too.
    model.save_pretrained(tmp_path / "saved")
    found = elsewhere(tmp_path / "saved", tmp_path, trust_remote_code=True)
    assert found.stdout.strip() == f"{expected} 2", found.stderr


@pytest.mark.parametrize(("model_type", "changes"), [("mistral", {"sliding_window": 6}), ("smollm3", {})])
def test_its_own_cache_gives_the_tokens_of_whole_passes(
    model_type: str, changes: dict[str, Any], tmp_path: Path, random_plan: RandomPlan
) -> None:
    """With a window, beyond it."""
    model = tiny_model(model_type, num_hidden_layers=4, **changes)
    plan = random_plan(model, [0, 2])
    write_hf(tmp_path / "hf", model, plan, NoTokenizer(), "float32", Silent())
    expected = by_whole_passes(model, plan, 12)
    given = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    assert loaded(tmp_path / "hf").generate(PROMPT, **given)[0].tolist() == expected


def test_the_numbers_are_those_of_the_model_and_the_plan(
    model: Any, folder: Path, random_plan: RandomPlan
) -> None:
    found, plan = load_file(folder / "model-00001.safetensors"), random_plan(model, [0, 2])
    own = {name: p.numpy() for name, p in model.named_parameters() if ".0.self_attn." not in name}
    own = {name: value for name, value in own.items() if ".2.self_attn." not in name}
    for layer in (0, 2):
        own[f"model.layers.{layer}.self_attn.linear.weight"] = plan.layers[layer].w
        own[f"model.layers.{layer}.self_attn.linear.bias"] = plan.layers[layer].b
    assert found.keys() == own.keys()
    assert all(np.array_equal(found[name], own[name]) for name in own)


def test_the_configuration_says_what_stands_in_each_place(model: Any, random_plan: RandomPlan) -> None:
    plan = random_plan(model, [1, Mlp(2)])
    plan = plan.with_replaced({**plan.layers, 3: DROPPED})
    found = hf_configuration(model, plan, "bfloat16")
    assert found["nbl"]["modules"] == {
        "model.layers.1.self_attn": {"linear": True, "returns": 2},
        "model.layers.2.mlp": {"linear": True, "returns": None},
        "model.layers.3.self_attn": {"linear": False, "returns": 2},
    }
    assert found["dtype"] == "bfloat16" and found["hidden_size"] == model.config.hidden_size
    assert found["auto_map"]["AutoModelForCausalLM"] == "modeling_nbl.NblForCausalLM"


@pytest.mark.parametrize(
    ("model_type", "changes", "blocks", "said"),
    [
        ("opt", {}, [1], "--to hf takes gemma, .*, and OPTForCausalLM"),
        (
            "llama",
            {},
            [0, 1, 2, 3],
            "keeps the positions of a text in its KV cache, and this plan keeps none",
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
            [1],
            "attend in several ways",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_before_anything_is_written(
    model_type: str,
    changes: dict[str, Any],
    blocks: Sequence[Block],
    said: str,
    tmp_path: Path,
    random_plan: RandomPlan,
) -> None:
    model = tiny_model(model_type, num_hidden_layers=4, **changes)
    plan = random_plan(model, blocks)
    with pytest.raises(InputError, match=said):
        write_hf(tmp_path / "hf", model, plan, NoTokenizer(), "float32", Silent())
    assert not (tmp_path / "hf").exists()


# its blocks ---------------------------------------------------------------------------------------


def test_a_block_is_called_as_an_attention_and_as_an_mlp() -> None:
    states = torch.randn(2, 3, 8)
    attention, mlp = LinearBlock(8, True, 2), LinearBlock(8, True, None)
    assert attention.linear is not None and mlp.linear is not None
    y, weights = attention(hidden_states=states, attention_mask=None, past_key_values=None)
    assert torch.equal(y, attention.linear(states)) and weights is None
    assert torch.equal(mlp(states), mlp.linear(states))


def test_what_was_left_out_adds_nothing() -> None:
    dropped = LinearBlock(8, False, 2)
    assert not list(dropped.parameters())
    assert not dropped(torch.randn(1, 2, 8))[0].any()


def test_the_file_needs_torch_and_transformers_alone() -> None:
    """It is copied into folders that are loaded without nbl-export."""
    tree = ast.parse(classes_of("llama")[1].source())
    names = {
        node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert names == {"__future__", "pathlib", "typing", "torch", "transformers"}


@pytest.mark.parametrize("model_type", TYPES)
def test_the_classes_are_those_of_the_type_with_linear_layers(model_type: str) -> None:
    config, model = classes_of(model_type)
    plain = CONFIG_MAPPING[model_type]
    assert issubclass(config, plain) and config.model_type == PREFIX + model_type
    assert issubclass(model, Linearized) and model.config_class is config
    text = model.source()
    assert f"from transformers import {plain.__name__}, {model.__mro__[2].__name__}" in text
    compile(text, "modeling_nbl.py", "exec")
