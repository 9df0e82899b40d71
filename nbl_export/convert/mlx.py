"""Model + plan → a folder of mlx-lm's architecture ``nemotron-nas``, which knows linear attention and linear MLPs.

Each layer of it has an attention, a matrix with a bias in its place, or nothing, and an MLP likewise. Biases are of all
layers or of none: where one has a bias, the others get zeros. The inner width of its MLPs is a multiple of 256: a
narrower one gets zeros, which change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.batch.arrays import F32
from nbl_export.blocks import Block, Mlp
from nbl_export.convert.llama import LAYERS, check_like_llama, numbers, rope_base
from nbl_export.convert.shards import Shards
from nbl_export.errors import InputError
from nbl_export.files import write_json
from nbl_export.linearize.plan import Plan
from nbl_export.models.folder import save_tokenizer
from nbl_export.progress import Listener

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "nemotron-nas"
_MULTIPLE = 256  # of the inner width of an MLP
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
# What W is called in the place of a module.
_MATRICES = {"self_attn": "linear", "mlp": "linear"}
_Tensor = tuple[str, F32]


def write_mlx(
    folder: Path, model: torch.nn.Module, plan: Plan, tokenizer: Any, dtype: str, listener: Listener
) -> list[Path]:
    """Write ``model``, a decoder like Llama, with ``plan`` into ``folder``, in a dtype of torch such as ``float16``.

    Returns the files, of which the configuration is written last: without it nothing loads the folder. Raises
    :class:`InputError`, before anything is written, for what the architecture cannot hold.
    """
    check_held(model, plan)
    return write_folder(folder, model, plan, tokenizer, Shards(folder, dtype, "mlx"), _MATRICES, listener)


def write_folder(
    folder: Path,
    model: torch.nn.Module,
    plan: Plan,
    tokenizer: Any,
    files: Shards,
    matrices: Mapping[str, str],
    listener: Listener,
    told: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write the folder into ``files``; ``matrices`` says what W of an attention and of an MLP is called, and ``told``
    what its configuration says beside the usual.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    config.unlink(missing_ok=True)
    source = _Source(model, plan, matrices)
    files.add(*source.own("model.embed_tokens.weight"))
    with listener.task("Writing weights", plan.layer_count, "layers") as task:
        for layer in range(plan.layer_count):
            for tensor in source.layer(layer):
                files.add(*tensor)
            task.advance(1)
    files.add(*source.own("model.norm.weight"))
    if not model.config.tie_word_embeddings:  # type: ignore[union-attr]
        files.add(*source.own("lm_head.weight"))
    written = files.finish()
    written += save_tokenizer(tokenizer, folder)
    write_json(config, {**configuration(model, plan), **(told or {})})
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


def configuration(model: torch.nn.Module, plan: Plan) -> dict[str, Any]:
    """The ``config.json`` of the folder."""
    config: Any = model.config
    told: dict[str, Any] = dict(
        getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    )
    kind = told.get("rope_type", "default")
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "rms_norm_eps",
        "vocab_size",
        "hidden_act",
    )
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": ARCHITECTURE,
        **{
            name: getattr(config, name) for name in (*names, "max_position_embeddings", "tie_word_embeddings")
        },
        "attention_bias": _has_bias(model, plan, attention=True),
        "mlp_bias": _has_bias(model, plan, attention=False),
        "rope_theta": rope_base(model),
        "rope_scaling": None if kind == "default" else {k: v for k, v in told.items() if k != "rope_theta"},
        "block_configs": [
            {"attention": _attention(config, plan, layer), "ffn": _mlp(config, plan, layer)}
            for layer in range(plan.layer_count)
        ],
        "eos_token_id": config.eos_token_id,
        "bos_token_id": config.bos_token_id,
    }


def _attention(config: Any, plan: Plan, layer: int) -> dict[str, Any]:
    kept = {"n_heads_in_group": config.num_attention_heads // config.num_key_value_heads}
    return _state(plan, layer) or kept


def _mlp(config: Any, plan: Plan, layer: int) -> dict[str, Any]:
    return _state(plan, Mlp(layer)) or {"ffn_mult": 3 * _inner(config) / (2 * config.hidden_size)}


def _state(plan: Plan, block: Block) -> dict[str, Any]:
    """What stands in the place of a ``block``; nothing where it stays."""
    if block in plan.layers:
        return {"replace_with_linear": True}
    return {"no_op": True} if block in plan.dropped else {}


def _inner(config: Any) -> int:
    """The inner width of the MLPs in the folder."""
    return -(-int(config.intermediate_size) // _MULTIPLE) * _MULTIPLE


def _has_bias(model: torch.nn.Module, plan: Plan, attention: bool) -> bool:
    names = (
        (f".self_attn.{name}.bias" for name in _QKVO) if attention else (f".mlp.{name}.bias" for name in _MLP)
    )
    ends = tuple(names)
    linear = any(
        isinstance(block, Mlp) is not attention and one.b.any() for block, one in plan.layers.items()
    )
    return linear or any(name.endswith(ends) for name, _ in model.named_parameters())


class _Source:
    """Where the tensors of the folder come from, each a name and its numbers: a model like Llama, and the plan."""

    def __init__(self, model: torch.nn.Module, plan: Plan, matrices: Mapping[str, str]) -> None:
        self._model, self._plan, self._inner, self._matrices = model, plan, _inner(model.config), matrices
        self._biased, self._mlp_biased = (_has_bias(model, plan, attention) for attention in (True, False))
        self._names = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def own(self, name: str) -> _Tensor:
        """A tensor of the model, as it is."""
        return name, numbers(self._model, self._plan, name)

    def layer(self, layer: int) -> Iterator[_Tensor]:
        """Those of one layer; of what is dropped there is none."""
        plan, at, d = self._plan, f"{LAYERS}.{layer}", self._plan.hidden_size
        blocks: tuple[tuple[Block, str, str], ...] = (
            (layer, "input_layernorm", "self_attn"),
            (Mlp(layer), "post_attention_layernorm", "mlp"),
        )
        for block, norm, module in blocks:
            if block in plan.dropped:
                continue
            yield self.own(f"{at}.{norm}.weight")
            if block in plan.layers:
                linear = plan.layers[block]
                name = f"{at}.{module}.{self._matrices[module]}"
                yield f"{name}.weight", linear.w
                if self._biased if module == "self_attn" else self._mlp_biased:
                    yield f"{name}.bias", linear.b
            elif module == "self_attn":
                for name in _QKVO:
                    yield from self._projection(f"{at}.self_attn.{name}", self._biased)
            else:
                for name, shape in zip(
                    _MLP, ((self._inner, d), (self._inner, d), (d, self._inner)), strict=True
                ):
                    yield from self._projection(f"{at}.mlp.{name}", self._mlp_biased, shape)

    def _projection(self, name: str, bias: bool, shape: tuple[int, ...] | None = None) -> Iterator[_Tensor]:
        """A weight, with zeros up to ``shape``, and its bias where all have one."""
        _, weight = self.own(f"{name}.weight")
        found = weight if shape is None else _padded(weight, shape)
        yield f"{name}.weight", found
        if bias:
            known = f"{name}.bias" in self._names
            own = self.own(f"{name}.bias")[1] if known else np.zeros(0, np.float32)
            yield f"{name}.bias", _padded(own, (found.shape[0],))


def _padded(values: F32, shape: tuple[int, ...]) -> F32:
    """``values`` with zeros behind them, up to ``shape``."""
    wider = [(0, wanted - had) for wanted, had in zip(shape, values.shape, strict=True)]
    return np.pad(values, wider) if any(after for _, after in wider) else values
