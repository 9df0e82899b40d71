"""Write model + plan as a folder of mlx-lm's architecture ``nemotron-nas``, or of DeciLM, which TensorRT-LLM reads.

Each layer has an attention, a matrix in its place, or nothing, and an MLP likewise. In mlx-lm biases are of all layers
or of none: where one has a bias, the others get zeros. The inner width of its MLPs is a multiple of 256: a narrower one
gets zeros, which change nothing. DeciLM has other names, and no biases anywhere: the plan's b must be in its W already
(:mod:`nbl_export.linearize.fits`). Source: tensorrt_llm/_torch/models/modeling_nemotron_nas.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.batch.arrays import F32
from nbl_export.blocks import Block, Mlp
from nbl_export.convert.llama import LAYERS, check_like_llama, numbers, rope_base, write_folder
from nbl_export.errors import InputError
from nbl_export.linearize.plan import Plan
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

    Returns the files. Raises :class:`InputError`, before anything is written, for what the architecture cannot hold.
    """
    check_held(model, plan)
    tensors, told = dict(_tensors(model, plan, _IN_MLX)), configuration(model, plan)
    return write_folder(folder, tensors, dtype, "mlx", tokenizer, {}, told, listener)


def write_decilm(
    folder: Path, model: torch.nn.Module, plan: Plan, tokenizer: Any, dtype: str, listener: Listener
) -> list[Path]:
    """:func:`write_mlx` of a ``plan`` whose b are zero, in DeciLM's form."""
    check_held_by_decilm(model, plan)
    if biased := [block for block, one in plan.layers.items() if one.b.any()]:
        raise InputError(f"Layer {biased[0]} has a bias, and DeciLM has none: take it into W first.")
    told = configuration(model, plan) | {
        "auto_map": {"AutoConfig": f"{Path(FILE).stem}.DeciLMConfig"},
        "torch_dtype": dtype,
        "dtype": dtype,
    }
    tensors = dict(_tensors(model, plan, _IN_DECILM))
    return write_folder(folder, tensors, dtype, "pt", tokenizer, {FILE: _CONFIGURATION}, told, listener)


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
    model: torch.nn.Module, plan: Plan, names: Mapping[str, str]
) -> Iterator[tuple[str, Callable[[], F32]]]:
    """Those of the folder, each a name and what gives its numbers; of what is dropped there is none."""
    config: Any = model.config
    d, wide = plan.hidden_size, _inner(config)
    inner = {"gate_proj": (wide, d), "up_proj": (wide, d), "down_proj": (d, wide)}

    def own(name: str, shape: Sequence[int] | None = None) -> tuple[str, Callable[[], F32]]:
        """A parameter of the model, with zeros behind it up to ``shape``; zeros alone where it has none."""

        def read() -> F32:
            found = (
                numbers(model, plan, name)
                if name in parameters
                else np.zeros([0] * len(shape or ()), np.float32)
            )
            grown = [(0, wanted - had) for wanted, had in zip(shape or found.shape, found.shape, strict=True)]
            return np.pad(found, grown)

        return name, read

    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    biased = {module: _has_bias(model, plan, module) for module in _PROJECTIONS}
    yield own("model.embed_tokens.weight")
    for layer in range(plan.layer_count):
        at = f"{LAYERS}.{layer}"
        blocks: tuple[tuple[Block, str, str], ...] = (
            (layer, "input_layernorm", "self_attn"),
            (Mlp(layer), "post_attention_layernorm", "mlp"),
        )
        for block, norm, module in blocks:
            if block in plan.dropped:
                continue
            yield own(f"{at}.{norm}.weight")
            if (linear := plan.layers.get(block)) is not None:
                name = f"{at}.{module}.{names[module]}"
                yield f"{name}.weight", partial(getattr, linear, "w")
                if biased[module]:
                    yield f"{name}.bias", partial(getattr, linear, "b")
                continue
            for projection in _PROJECTIONS[module]:
                name = f"{at}.{module}.{projection}"
                shape = inner.get(projection, parameters[f"{name}.weight"])
                yield own(f"{name}.weight", shape)
                if biased[module]:
                    yield own(f"{name}.bias", shape[:1])
    yield own("model.norm.weight")
    if not config.tie_word_embeddings:
        yield own("lm_head.weight")
