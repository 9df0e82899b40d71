"""Write model + plan as a folder of mlx-lm's architecture ``nemotron-nas``, or of DeciLM, which TensorRT-LLM reads.

Each layer has an attention, a matrix in its place, or nothing, and an MLP likewise. In mlx-lm biases are of all layers
or of none: where one has a bias, the others get zeros. The inner width of its MLPs is a multiple of 256: a narrower one
gets zeros, which change nothing. DeciLM has other names, and no biases anywhere: the plan's b must be in its W already
(:mod:`nbl_export.linearize.fits`). Source: tensorrt_llm/_torch/models/modeling_nemotron_nas.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.batch.arrays import F32
from nbl_export.blocks import Block, Mlp
from nbl_export.convert.llama import LAYERS, Shards, check_like_llama, numbers, rope_base
from nbl_export.errors import InputError
from nbl_export.files import write_json, write_text
from nbl_export.linearize.plan import Plan
from nbl_export.models.folder import save_tokenizer
from nbl_export.progress import Listener

ARCHITECTURE = "nemotron-nas"
_MULTIPLE = 256  # of the inner width of an MLP
# The projections of each module, by which a bias is found.
_PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
# What W is called in the place of a module, and how mlx-lm is told of DeciLM's names.
_IN_MLX = {"self_attn": "linear", "mlp": "linear"}
_IN_DECILM = {"self_attn": "linear_attn", "mlp": "linear_mlp"}
IN_MLX = {f"{module}.{name}.": f"{module}.linear." for module, name in _IN_DECILM.items()}
FILE = "configuration_decilm.py"
# Its readers take the parts of a block by attribute, which JSON does not have.
_CONFIGURATION = '''"""DeciLM's configuration: each block says what stands in the place of its attention and its MLP."""

from transformers import PretrainedConfig


class Named(dict):
    """A dict whose values are attributes, too; what is missing is None."""

    __getattr__ = dict.get


ATTENTION = {"n_heads_in_group": None, "no_op": False, "replace_with_linear": False}
MLP = {"ffn_mult": None, "no_op": False, "replace_with_linear": False}


class DeciLMConfig(PretrainedConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **others):
        self.block_configs = [
            Named(
                attention=Named({**ATTENTION, **block["attention"]}),
                ffn=Named({**MLP, **block["ffn"]}),
            )
            for block in block_configs
        ]
        super().__init__(**others)
'''


def write_mlx(
    folder: Path, model: torch.nn.Module, plan: Plan, tokenizer: Any, dtype: str, listener: Listener
) -> list[Path]:
    """Write ``model``, a decoder like Llama, with ``plan`` into ``folder``, in a dtype of torch such as ``float16``.

    Returns the files, of which the configuration is written last: without it nothing loads the folder. Raises
    :class:`InputError`, before anything is written, for what the architecture cannot hold.
    """
    check_held(model, plan)
    return _write(folder, model, plan, tokenizer, Shards(folder, dtype, "mlx"), _IN_MLX, listener, {})


def write_decilm(
    folder: Path, model: torch.nn.Module, plan: Plan, tokenizer: Any, dtype: str, listener: Listener
) -> list[Path]:
    """:func:`write_mlx` of a ``plan`` whose b are zero, in DeciLM's form."""
    check_held_by_decilm(model, plan)
    if biased := [block for block, one in plan.layers.items() if one.b.any()]:
        raise InputError(f"Layer {biased[0]} has a bias, and DeciLM has none: take it into W first.")
    told = {
        "auto_map": {"AutoConfig": f"{Path(FILE).stem}.DeciLMConfig"},
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    written = _write(folder, model, plan, tokenizer, Shards(folder, dtype, "pt"), _IN_DECILM, listener, told)
    return [folder / FILE, *written]


def _write(
    folder: Path,
    model: torch.nn.Module,
    plan: Plan,
    tokenizer: Any,
    files: Shards,
    names: Mapping[str, str],
    listener: Listener,
    told: Mapping[str, Any],
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    config.unlink(missing_ok=True)
    head = [] if model.config.tie_word_embeddings else ["lm_head.weight"]  # type: ignore[union-attr]
    with listener.task("Writing weights", plan.layer_count, "layers") as task:
        files.add("model.embed_tokens.weight", numbers(model, plan, "model.embed_tokens.weight"))
        for layer in range(plan.layer_count):
            for name, value in _tensors(model, plan, layer, names):
                files.add(name, value)
            task.advance(1)
        for name in ("model.norm.weight", *head):
            files.add(name, numbers(model, plan, name))
    written = files.finish()
    written += save_tokenizer(tokenizer, folder)
    if told:
        write_text(folder / FILE, _CONFIGURATION)
    write_json(config, {**configuration(model, plan), **told})
    return [*written, config]


def check_held(model: torch.nn.Module, plan: Plan) -> None:
    """Raise :class:`InputError` for a model, or a plan, that the architecture cannot hold."""
    check_like_llama(model, plan, "mlx-lm")
    config: Any = model.config
    heads, head_dim = config.num_attention_heads, getattr(config, "head_dim", None)
    if head_dim not in (None, config.hidden_size // heads):
        raise InputError(
            f"mlx-lm has heads of {config.hidden_size // heads} in such a model, and {type(model).__name__} of "
            f"{head_dim}: convert it --to gguf."
        )


def check_held_by_decilm(model: torch.nn.Module, plan: Plan) -> None:
    """:func:`check_held`, and there is no bias."""
    check_held(model, plan)
    if biased := [name for name, _ in model.named_parameters() if name.endswith("_proj.bias")]:
        raise InputError(
            f"DeciLM has no biases, and {type(model).__name__} has {biased[0]}: convert it --to mlx."
        )


def configuration(model: torch.nn.Module, plan: Plan) -> dict[str, Any]:
    """The ``config.json`` of the folder."""
    config: Any = model.config
    rope: dict[str, Any] = dict(getattr(config, "rope_parameters", None) or {})
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "vocab_size",
        "hidden_act",
        "max_position_embeddings",
        "tie_word_embeddings",
    )
    kept = {
        "attention": {"n_heads_in_group": config.num_attention_heads // config.num_key_value_heads},
        "ffn": {"ffn_mult": 3 * _inner(config) / (2 * config.hidden_size)},
    }

    def stands(block: Block, part: str) -> dict[str, Any]:
        if block in plan.layers:
            return {"replace_with_linear": True}
        return {"no_op": True} if block in plan.dropped else kept[part]

    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": ARCHITECTURE,
        **{name: getattr(config, name) for name in names},
        "attention_bias": _has_bias(model, plan, "self_attn"),
        "mlp_bias": _has_bias(model, plan, "mlp"),
        "rope_theta": rope_base(model),
        "rope_scaling": None
        if rope.get("rope_type", "default") == "default"
        else {k: v for k, v in rope.items() if k != "rope_theta"},
        "block_configs": [
            {"attention": stands(layer, "attention"), "ffn": stands(Mlp(layer), "ffn")}
            for layer in range(plan.layer_count)
        ],
        "eos_token_id": config.eos_token_id,
        "bos_token_id": config.bos_token_id,
    }


def _inner(config: Any) -> int:
    """The inner width of the MLPs in the folder."""
    return -(-int(config.intermediate_size) // _MULTIPLE) * _MULTIPLE


def _has_bias(model: torch.nn.Module, plan: Plan, module: str) -> bool:
    ends = tuple(f".{module}.{name}.bias" for name in _PROJECTIONS[module])
    linear = (
        one.b.any() for block, one in plan.layers.items() if isinstance(block, Mlp) == (module == "mlp")
    )
    return any(linear) or any(name.endswith(ends) for name, _ in model.named_parameters())


def _tensors(
    model: torch.nn.Module, plan: Plan, layer: int, names: Mapping[str, str]
) -> Iterator[tuple[str, F32]]:
    """Those of one layer, each a name and its numbers; of what is dropped there is none."""
    config: Any = model.config
    at, wide = f"{LAYERS}.{layer}", _inner(config)
    blocks: tuple[tuple[Block, str, str], ...] = (
        (layer, "input_layernorm", "self_attn"),
        (Mlp(layer), "post_attention_layernorm", "mlp"),
    )
    for block, norm, module in blocks:
        if block in plan.dropped:
            continue
        bias = _has_bias(model, plan, module)
        yield f"{at}.{norm}.weight", numbers(model, plan, f"{at}.{norm}.weight")
        if block in plan.layers:
            own = plan.layers[block]
            yield f"{at}.{module}.{names[module]}.weight", own.w
            if bias:
                yield f"{at}.{module}.{names[module]}.bias", own.b
            continue
        for projection in _PROJECTIONS[module]:
            name = f"{at}.{module}.{projection}"
            weight = numbers(model, plan, f"{name}.weight")
            if module == "mlp":
                shape = (plan.hidden_size, wide)
                weight = _padded(weight, shape if projection == "down_proj" else shape[::-1])
            yield f"{name}.weight", weight
            if bias:
                known = getattr(model.get_submodule(name), "bias", None) is not None
                value = numbers(model, plan, f"{name}.bias") if known else np.zeros(0, np.float32)
                yield f"{name}.bias", _padded(value, weight.shape[:1])


def _padded(values: F32, shape: Any) -> F32:
    """``values`` with zeros behind them, up to ``shape``."""
    return np.pad(values, [(0, wanted - had) for wanted, had in zip(shape, values.shape, strict=True)])
