"""The folders for transformers, mlx-lm and readers of DeciLM, as their users load them; which models engines take."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from nbl_export.blocks import Block, Mlp
from nbl_export.convert import folders
from nbl_export.convert.folders import (
    IN_MLX,
    check_like_llama,
    hf_configuration,
    mlx_configuration,
    numbers,
    rope_base,
    write_decilm,
    write_hf,
    write_mlx,
)
from nbl_export.convert.gguf import rope_factors
from nbl_export.errors import InputError
from nbl_export.linearize.plan import DROPPED, Adapter, LinearLayer, Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.modeling_nbl import PREFIX, TYPES, LinearBlock, Linearized, classes_of
from nbl_export.progress import Silent
from nbl_export.runtime.clients import MlxStream
from tests.families import WRONG, assert_as_in_pytorch, needs, stream_parity, wrongly
from tests.tiny_types import tiny_model

RandomPlan = Callable[[Any, Sequence[Block]], Plan]


class NoTokenizer:
    """A tokenizer without files."""

    def save_pretrained(self, _folder: Path) -> tuple[str, ...]:
        return ()


def test_the_configuration_says_what_stands_in_each_place(random_plan: RandomPlan) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    plan = random_plan(model, [0, Mlp(1)])
    plan = plan.with_replaced({**plan.layers, 2: DROPPED})
    found = mlx_configuration(model, plan)
    linear, gone, kept = {"replace_with_linear": True}, {"no_op": True}, {"n_heads_in_group": 2}
    assert [block["attention"] for block in found["block_configs"]] == [linear, kept, gone]
    mlps = [block["ffn"] for block in found["block_configs"]]
    assert mlps[1] == linear and mlps[0] == mlps[2] == {"ffn_mult": 12.0}  # 2 · 12 · 32 / 3 = 256
    assert (found["model_type"], found["attention_bias"], found["mlp_bias"]) == ("nemotron-nas", True, True)
    plain = mlx_configuration(model, plan.without_layers())
    assert (plain["attention_bias"], plain["mlp_bias"]) == (False, False)


def test_numbers_are_the_models_and_what_is_added_is_zero(tmp_path: Path, random_plan: RandomPlan) -> None:
    model = tiny_model("qwen2", num_hidden_layers=3)
    plan = random_plan(model, [1])
    files = write_mlx(tmp_path, model, plan, NoTokenizer(), "float32", Silent())
    assert files[-1].name == "config.json" and all(path.is_file() for path in files)
    found = load_file(tmp_path / "model-00001.safetensors")
    own = {name: parameter.numpy() for name, parameter in model.named_parameters()}
    assert np.array_equal(found["model.layers.1.self_attn.linear.weight"], plan.layers[1].w)
    assert np.array_equal(found["model.layers.1.self_attn.linear.bias"], plan.layers[1].b)
    name = "model.layers.0.mlp.up_proj.weight"
    assert found[name].shape == (256, 32) and np.array_equal(found[name][:48], own[name])
    assert not found[name][48:].any() and not found["model.layers.0.mlp.down_proj.weight"][:, 48:].any()
    # Queries have a bias in Qwen 2, the output has none: here all have one.
    assert np.array_equal(
        found["model.layers.0.self_attn.q_proj.bias"], own["model.layers.0.self_attn.q_proj.bias"]
    )
    assert not found["model.layers.0.self_attn.o_proj.bias"].any()
    assert "model.layers.1.self_attn.q_proj.weight" not in found


# DeciLM -------------------------------------------------------------------------------------------


def no_bias(plan: Plan) -> Plan:
    layers = {block: LinearLayer(one.w, np.zeros_like(one.b)) for block, one in plan.layers.items()}
    return replace(plan, layers=layers)


def test_names_and_configuration_are_those_of_its_readers(
    tmp_path: Path, random_plan: RandomPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    plan = no_bias(random_plan(model, [0, Mlp(1)]))
    plan = plan.with_replaced({**plan.layers, 2: DROPPED})
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


@needs("decilm")
def test_it_computes_what_pytorch_does(tmp_path: Path, random_plan: RandomPlan) -> None:
    """In mlx-lm, which has the same form by other names."""
    model = tiny_model("llama", num_hidden_layers=4)
    plan = no_bias(random_plan(model, [0, 2, Mlp(3)]))
    write_decilm(tmp_path / "own", model, plan, NoTokenizer(), "float32", Silent())
    assert_as_in_pytorch(lambda: MlxStream(tmp_path / "own", IN_MLX), model, plan)
    for change in set(WRONG) - {"no bias"}:
        write_decilm(tmp_path / change, model, wrongly(change, plan), NoTokenizer(), "float32", Silent())
        assert stream_parity(MlxStream(tmp_path / change, IN_MLX), model, plan).failures() != []


# models like Llama --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gemma2", {}, "Gemma2ForCausalLM (gemma2) is none: convert takes llama, mistral, qwen2."),
        ("llama", {"hidden_act": "gelu"}, "gates with SiLU, and LlamaForCausalLM (llama) with gelu."),
        ("mistral", {"sliding_window": 8}, "MistralForCausalLM (mistral) has a sliding window"),
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
    monkeypatch.setattr(folders, "_SHARD", 1000)
    own = {f"w{i}": np.full((10, 20), i, np.float32) for i in range(5)}  # 400 bytes each
    told = ("float16", "pt", NoTokenizer(), {"a.txt": "a"}, {"of": 1}, Silent())
    read = {name: partial(own.get, name) for name in own}
    *paths, index, text, config = folders.write_folder(tmp_path, read, *told)  # type: ignore[arg-type]
    assert [path.name for path in paths] == [f"model-0000{n}.safetensors" for n in (1, 2, 3)]
    assert text.read_text() == "a" and json.loads(config.read_text()) == {"of": 1}
    raw = json.loads(index.read_text())
    assert raw["metadata"] == {"total_size": 2000}
    found = {}
    for path in paths:
        tensors = load_file(path)
        assert {name for name, place in raw["weight_map"].items() if place == path.name} == set(tensors)
        with safe_open(path, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
        found |= tensors
    assert all(found[n].dtype == np.float16 and np.array_equal(found[n], own[n]) for n in own)
    with pytest.raises(InputError, match="w has numbers that float16 does not have: use --precision bf16"):
        folders.write_folder(tmp_path, {"w": lambda: np.array([1e6], np.float32)}, *told)
    assert not config.exists()


# transformers -------------------------------------------------------------------------------------

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
    import nbl_export.transformers  # noqa: F401

    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


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


def test_the_configuration_for_transformers_says_what_stands_in_each_place(
    model: Any, random_plan: RandomPlan
) -> None:
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


TWO_WAYS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}


@pytest.mark.parametrize(
    ("write", "model_type", "changes", "blocks", "said"),
    [
        (write_hf, "opt", {}, [1], "--to hf takes gemma, .*, and OPTForCausalLM"),
        (
            write_hf,
            "llama",
            {},
            [0, 1, 2, 3],
            "keeps the positions of a text in its KV cache, and this plan keeps",
        ),
        (write_hf, "qwen2", TWO_WAYS, [1], "attend in several ways"),
        (
            write_mlx,
            "mistral",
            {"sliding_window": None, "head_dim": 16},
            [1],
            "mlx-lm has heads of 8 in such a",
        ),
        (write_mlx, "gemma2", {}, [1], "mlx-lm has linear attention for models like Llama alone"),
        (write_decilm, "llama", {}, [1], "Layer 1 has a bias, and DeciLM has none: take it into W first"),
        (
            write_decilm,
            "qwen2",
            {},
            [1],
            r"DeciLM has no biases, and Qwen2ForCausalLM has model\.layers\.0\.",
        ),
    ],
)
def test_what_cannot_be_held_is_refused_before_anything_is_written(
    write: Any,
    model_type: str,
    changes: dict[str, Any],
    blocks: Sequence[Block],
    said: str,
    tmp_path: Path,
    random_plan: RandomPlan,
) -> None:
    model = tiny_model(model_type, num_hidden_layers=4, **changes)
    with pytest.raises(InputError, match=said):
        write(tmp_path / "a", model, random_plan(model, blocks), NoTokenizer(), "float32", Silent())
    assert not (tmp_path / "a").exists()


# its blocks ---------------------------------------------------------------------------------------


def test_a_block_is_called_as_an_attention_and_as_an_mlp_and_dropped_it_adds_nothing() -> None:
    states = torch.randn(2, 3, 8)
    attention, mlp, dropped = LinearBlock(8, True, 2), LinearBlock(8, True, None), LinearBlock(8, False, 2)
    assert attention.linear is not None and mlp.linear is not None
    y, weights = attention(hidden_states=states, attention_mask=None, past_key_values=None)
    assert torch.equal(y, attention.linear(states)) and weights is None
    assert torch.equal(mlp(states), mlp.linear(states))
    assert not list(dropped.parameters()) and not dropped(states)[0].any()


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
