"""Read models like Llama, the only ones of which other engines know a linear attention, and write files of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nbl_export.batch.arrays import F32
from nbl_export.errors import InputError
from nbl_export.files import atomic_path, write_json
from nbl_export.linearize.plan import Plan
from nbl_export.models.weights import all_finite, held

# Model types of transformers whose layers are those of Llama: RMS norms before attention and MLP, a gated MLP.
LIKE_LLAMA = ("llama", "mistral", "qwen2")
LAYERS = "model.layers"
_SHARD = 1 << 30  # bytes of one file of weights


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
    with held(model, [name]), torch.inference_mode():
        found: F32 = model.get_parameter(name).detach().float().cpu().numpy()
    adapter = plan.adapters.get(name)
    return found if adapter is None else found + adapter.change()


class Shards:
    """The files of weights in ``folder``, one after the other, so that memory has one of them, and their index.

    Weights are in a ``dtype`` of torch such as ``float16``; ``made_by`` is what a file says it is of (``pt``, ``mlx``).
    """

    def __init__(self, folder: Path, dtype: str, made_by: str) -> None:
        self._folder, self._dtype, self._made_by = folder, dtype, made_by
        self._held: dict[str, torch.Tensor] = {}
        self._bytes = self._total = 0
        self._names: list[list[str]] = []

    def add(self, name: str, value: F32) -> None:
        """Add a weight; raises :class:`InputError` for numbers that the dtype does not have."""
        tensor = torch.tensor(value, dtype=getattr(torch, self._dtype))
        if not all_finite(tensor):
            raise InputError(f"{name} has numbers that {self._dtype} does not have: use --precision bf16.")
        size = tensor.numel() * tensor.element_size()
        if self._held and self._bytes + size > _SHARD:
            self._write()
        self._held[name] = tensor
        self._bytes += size
        self._total += size

    def _path(self, number: int) -> Path:
        return self._folder / f"model-{number + 1:05}.safetensors"

    def _write(self) -> None:
        from safetensors.torch import save_file

        with atomic_path(self._path(len(self._names))) as temporary:
            save_file(self._held, temporary, metadata={"format": self._made_by})
        self._names.append(list(self._held))
        self._held, self._bytes = {}, 0

    def finish(self) -> list[Path]:
        """Write what is left, and the index; returns all files."""
        self._write()
        index = self._folder / "model.safetensors.index.json"
        places = {name: self._path(n).name for n, names in enumerate(self._names) for name in names}
        write_json(index, {"metadata": {"total_size": self._total}, "weight_map": places})
        return [*(self._path(n) for n in range(len(self._names))), index]
