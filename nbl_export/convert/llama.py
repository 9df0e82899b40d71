"""Models like Llama, the only ones of which other engines know a linear attention: what they are, and their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbl_export.batch.arrays import F32
from nbl_export.errors import InputError
from nbl_export.linearize.plan import Plan
from nbl_export.models.weights import held

if TYPE_CHECKING:
    import torch

# Model types of transformers whose layers are those of Llama: RMS norms before attention and MLP, a gated MLP.
LIKE_LLAMA = ("llama", "mistral", "qwen2")
LAYERS = "model.layers"


def check_like_llama(model: torch.nn.Module, plan: Plan, engine: str) -> None:
    """Raise :class:`InputError` for a model that is not like Llama, or a plan that ``engine`` cannot hold."""
    config: Any = model.config
    name = f"{type(model).__name__} ({config.model_type})"
    if config.model_type not in LIKE_LLAMA:
        raise InputError(
            f"{engine} has linear attention for models like Llama alone, and {name} is none: convert takes "
            f"{', '.join(LIKE_LLAMA)}."
        )
    if plan.fit_input != "normed":
        raise InputError(
            f"{engine} multiplies W with the normed stream, and this plan's W reads the residual stream: select again "
            "without --fit-input residual."
        )
    if config.hidden_act != "silu":
        raise InputError(f"{engine} gates with SiLU, and {name} with {config.hidden_act}.")
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (config.model_type == "mistral" and config.sliding_window):
        raise InputError(
            f"{name} has a sliding window, which {engine} does not have beside linear attention."
        )
    rotary: Any = model.get_submodule("model").rotary_emb
    if rotary.rope_type not in ("default", "linear", "llama3") or rotary.attention_scaling != 1:
        raise InputError(
            f"{name} has rotary embeddings of the kind {rotary.rope_type!r}: convert takes default, linear, llama3."
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


def numbers(model: torch.nn.Module, plan: Plan, name: str) -> F32:
    """A parameter of ``model`` in float32, with what a repair changed."""
    import torch

    with held(model, [name]), torch.inference_mode():
        found: F32 = model.get_parameter(name).detach().float().cpu().numpy()
    adapter = plan.adapters.get(name)
    return found if adapter is None else found + adapter.change()
