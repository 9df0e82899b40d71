"""Read models like Llama, of which alone other engines know a linear attention, and write folders of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nbl_export.batch.arrays import F32
from nbl_export.errors import InputError
from nbl_export.files import atomic_path, json_text, write_json, write_text
from nbl_export.linearize.plan import Plan
from nbl_export.models.folder import save_tokenizer
from nbl_export.models.weights import all_finite, held
from nbl_export.progress import Listener

# Model types of transformers whose layers are those of Llama: RMS norms before attention and MLP, a gated MLP.
LIKE_LLAMA = ("llama", "mistral", "qwen2")
LAYERS = "model.layers"
_SHARD = 1 << 30  # bytes of one file of weights
_INDEX = "model.safetensors.index.json"


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


def write_folder(
    folder: Path,
    tensors: Mapping[str, Callable[[], F32]],
    dtype: str,
    made_by: str,
    tokenizer: Any,
    texts: Mapping[str, str],
    config: Mapping[str, Any],
    listener: Listener,
) -> list[Path]:
    """Write ``tensors``, each what gives its numbers, a tokenizer, ``texts`` and ``config`` into ``folder``.

    Returns the files, of which ``config.json`` is the last: without it nothing loads the folder. Weights are in a
    ``dtype`` of torch such as ``float16``, in files ``made_by`` such as ``mlx``, of which memory has one at a time.
    Raises :class:`InputError` for numbers that the dtype does not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    shards: list[list[str]] = []
    kept: dict[str, torch.Tensor] = {}
    total = 0

    def write() -> None:
        shards.append(list(kept))
        with atomic_path(folder / _shard(len(shards))) as temporary:
            save_file(kept, temporary, metadata={"format": made_by})
        kept.clear()

    with listener.task("Writing weights", len(tensors), "tensors") as task:
        for name, read in tensors.items():
            tensor = torch.tensor(read(), dtype=getattr(torch, dtype))
            if not all_finite(tensor):
                raise InputError(f"{name} has numbers that {dtype} does not have: use --precision bf16.")
            if kept and sum(other.nbytes for other in kept.values()) + tensor.nbytes > _SHARD:
                write()
            kept[name] = tensor
            total += tensor.nbytes
            task.advance(1)
        write()
    places = {name: _shard(number) for number, names in enumerate(shards, 1) for name in names}
    write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    written = [*(folder / _shard(n + 1) for n in range(len(shards))), folder / _INDEX]
    written += save_tokenizer(tokenizer, folder)
    for name, text in {**texts, "config.json": json_text(config)}.items():
        write_text(folder / name, text)
        written.append(folder / name)
    return written


def _shard(number: int) -> str:
    return f"model-{number:05}.safetensors"
