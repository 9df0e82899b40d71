"""A linearized Llama as llama.cpp's architecture ``deci`` builds it, which knows linear attention.

A block of that architecture is an attention and an MLP, each behind its norm. Its attention may be a matrix alone
(heads, but none of keys and values) or nothing (no heads). The bias of such a matrix is not added, but that of an MLP
is: so a linear layer is a block of its own, whose MLP is zero but for its bias.

    layer i      attention(i), MLP(i)            W, b, MLP(i)
    blocks       [attention i, MLP i]            [W, zeros + b]  [nothing, MLP i]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbl_export.blocks import Block, Mlp
from nbl_export.errors import InputError
from nbl_export.linearize.plan import Plan

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "deci"
# The inner width of an MLP of zeros: as narrow as the blocks of quantized formats allow.
ZEROS = 32
# Model types of transformers whose layers are those of Llama: RMS norms before attention and MLP, a gated MLP.
LIKE_LLAMA = ("llama", "mistral", "qwen2")


@dataclass(frozen=True)
class DeciBlock:
    """One block: the layer whose ``attention`` it has, or the block that is ``linear`` in it, and the layer of its
    ``mlp``; where there is none, the MLP is zeros and the bias of ``linear``.
    """

    attention: int | None = None
    linear: Block | None = None
    mlp: int | None = None

    @property
    def has_heads(self) -> bool:
        """Whether it has an attention or a matrix in its place, if only of zeros where it has nothing at all."""
        return self.attention is not None or self.linear is not None or self.mlp is None


def blocks_of(plan: Plan) -> tuple[DeciBlock, ...]:
    """The blocks of the model with ``plan``, in order; the first has heads, as the architecture asks for."""
    found = [block for layer in range(plan.layer_count) for block in _of_layer(plan, layer)]
    if not found or not found[0].has_heads:
        found.insert(0, DeciBlock())
    return tuple(found)


def _of_layer(plan: Plan, layer: int) -> Iterator[DeciBlock]:
    chosen, mlp = set(plan.chosen), Mlp(layer)
    kept = None if mlp in chosen else layer
    if layer not in chosen:
        yield DeciBlock(attention=layer, mlp=kept)
    else:
        if layer in plan.layers:
            yield DeciBlock(linear=layer)
        if kept is not None:
            yield DeciBlock(mlp=layer)
    if mlp in plan.layers:
        yield DeciBlock(linear=mlp)


def check_held(model: torch.nn.Module, plan: Plan) -> None:
    """Raise :class:`InputError` for a model, or a plan, that the architecture cannot hold."""
    config: Any = model.config
    name = f"{type(model).__name__} ({config.model_type})"
    if config.model_type not in LIKE_LLAMA:
        raise InputError(
            f"llama.cpp has linear attention for models like Llama alone, and {name} is none: --to gguf takes "
            f"{', '.join(LIKE_LLAMA)}."
        )
    if plan.fit_input != "normed":
        raise InputError(
            "llama.cpp multiplies W with the normed stream, and this plan's W reads the residual stream: select again "
            "without --fit-input residual."
        )
    if config.hidden_act != "silu":
        raise InputError(f"llama.cpp gates with SiLU, and {name} with {config.hidden_act}.")
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (config.model_type == "mistral" and config.sliding_window):
        raise InputError(f"{name} has a sliding window, which llama.cpp's {ARCHITECTURE} models do not have.")
    rotary: Any = model.get_submodule("model").rotary_emb
    if rotary.rope_type not in ("default", "linear", "llama3") or rotary.attention_scaling != 1:
        raise InputError(
            f"{name} has rotary embeddings of the kind {rotary.rope_type!r}: --to gguf takes default, linear, llama3."
        )


def rope_factors(model: torch.nn.Module) -> torch.Tensor | None:
    """By what each frequency is divided [head_dim / 2], from the model's own; None where they are plain."""
    rotary: Any = model.get_submodule("model").rotary_emb
    own = rotary.inv_freq.float()
    plain = rope_base(model) ** (-2.0 / (2 * len(own)) * own.new_tensor(range(len(own))))
    factors: torch.Tensor = plain / own
    return None if bool((factors - 1).abs().max() < 1e-5) else factors


def rope_base(model: torch.nn.Module) -> float:
    """θ of the rotary embeddings."""
    config: Any = model.config
    told: Any = getattr(config, "rope_parameters", None) or {}
    found: Any = told.get("rope_theta") or getattr(config, "rope_theta", 10000.0)
    return float(found)
