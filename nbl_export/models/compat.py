"""Differences between transformers 4.57 and 5: arguments, and the files of a model.

All differences are handled in this module. They are detected by features, not by version numbers.

transformers 5 writes configurations that 4 reads wrongly without an error: the settings of the rotary embedding are
in ``rope_parameters``, which 4 ignores, so a model trained with another base than 10,000 becomes a different one. Its
tokenizers have a class name that 4 does not know. A readable folder has both the old and the new keys.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.files import read_json, write_text
from nbl_export.models.config_keys import without_choices, without_files
from nbl_export.models.limits import weight_files

if TYPE_CHECKING:
    import torch

# arguments ----------------------------------------------------------------------------------------

CACHE_ARGUMENTS = ("cache", "past_key_values")  # the KV cache, today and before


def cache_argument(model: torch.nn.Module) -> str:
    """The name of the KV cache argument of ``forward``: it was renamed within transformers 5."""
    parameters = inspect.signature(model.forward).parameters
    new, old = CACHE_ARGUMENTS
    return new if new in parameters else old


def query_length(query: Any) -> Any:
    """The number of queries given to a cache or mask function; transformers 4 and 5.0 pass their slots [sequence]."""
    return query.shape[0] if hasattr(query, "shape") else query


def enable_softcapping(model: Any) -> None:
    """Use eager attention for a model with soft-capped scores: sdpa, the default of transformers 4, ignores them."""
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def growing_mask() -> Callable[..., Any]:
    """The mask function for a growing cache: transformers' own, unless it uses vmap, which torch 2.9 cannot export."""
    from transformers.masking_utils import sdpa_mask

    own: Callable[..., Any] = sdpa_mask
    return own if "use_vmap" in inspect.signature(own).parameters else _broadcast_mask


def _broadcast_mask(
    batch_size: Any,
    cache_position: torch.Tensor,
    kv_length: Any,
    mask_function: Callable[..., Any],
    attention_mask: torch.Tensor | None = None,
    **_: Any,
) -> torch.Tensor:
    """[batch or 1, 1, query, key] bool: the family's mask function of two slots, without padding."""
    import torch

    rows = torch.arange(batch_size)[:, None, None, None]
    head = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    key = torch.arange(kv_length)[None, None, None, :]
    visible: torch.Tensor = mask_function(rows, head, cache_position[None, None, :, None], key)
    return visible if attention_mask is None else visible & attention_mask[:, None, None, :]


def with_head(model: Any) -> str | None:
    """The class of transformers for ``model`` with a language-model head; None if there is none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    return None if found is None else str(found.__name__)


# files --------------------------------------------------------------------------------------------

CONFIG, TOKENIZER, SPECIAL = "config.json", "tokenizer_config.json", "special_tokens_map.json"
# The files that a loader may open; pickled weights are never used.
_HANDED_OVER = (
    *("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"),
    *("*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.vocab", "tokenizer.model.*"),
)

_NEUTRAL: dict[str, Callable[[Any], dict[str, Any]]] = {
    CONFIG: without_choices,
    TOKENIZER: without_files,
    SPECIAL: without_files,
}
_EPSILON_NAMES = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")

# The transformers 4 names of the entries of rope_parameters; each family reads its own.
_ROPE_NAMES = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
# The same for families with a different base for each kind of layer.
_BASE_NAMES = {
    "full_attention": ("rope_theta", "global_rope_theta"),
    "sliding_attention": ("rope_local_base_freq", "local_rope_theta"),
}
# Phi's long rotary embedding has its type under the oldest name, and no other keys than its factors.
_TYPE_NAMES = {"longrope": "type"}
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def weight_converter() -> Any:
    """The class that makes weights of several tensors of a checkpoint; None where a model has them as stored."""
    try:
        from transformers.core_model_loading import WeightConverter
    except ImportError:
        return None
    return WeightConverter


def names_in(model: Any) -> Callable[[str], str]:
    """What gives the name in ``model`` of a tensor of a checkpoint, by the renamings of transformers 5."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:
        return lambda name: name
    mapping = get_model_conversion_mapping(model)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    return lambda name: str(rename_source_key(name, renamings, converters, prefix, state)[0])


def is_transformers_4() -> bool:
    """Whether the installed transformers knows only the keys of version 4."""
    from transformers import modeling_rope_utils

    return not hasattr(modeling_rope_utils, "RopeParameters")


def readable_folder(source: Path, folder: Path) -> Path:
    """The model folder ``source`` if both major versions read it, else ``folder`` with links to its files."""
    return _linked(source, folder, _adapted(source))


def neutral_folder(source: Path, folder: Path) -> Path:
    """The model folder ``source``, or ``folder`` with links if it chooses implementations or names files."""
    return _linked(source, folder, _adapted(source, _NEUTRAL))


def _linked(source: Path, folder: Path, changed: Mapping[str, dict[str, Any] | None]) -> Path:
    if all(content is None for content in changed.values()):
        return source
    folder.mkdir(parents=True, exist_ok=True)
    places = [f"{place}{pattern}" for place in ("", "*/") for pattern in _HANDED_OVER]
    found = {p for place in places for p in source.glob(place) if p.is_file()}
    for path in sorted(found.union(weight_files(source))):
        link = folder / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    _write(folder, changed)
    return folder


def make_readable(folder: Path) -> None:
    """Write the configurations in ``folder`` with both sets of keys; a link is replaced, its target unchanged."""
    _write(folder, _adapted(folder))


def save_tokenizer(tokenizer: Any, folder: Path) -> list[Path]:
    """Write ``tokenizer``, or a processor of images, into ``folder`` for both major versions; returns its files."""

    def adapted(config: Mapping[str, Any]) -> dict[str, Any]:
        found = readable_tokenizer_config(config)
        if found.get("tokenizer_class") != config.get("tokenizer_class"):
            # The class that 4 knows gives token types, too, unless it is told which inputs there are.
            found.setdefault("model_input_names", list(tokenizer.model_input_names))
        return found

    written = [Path(path) for path in tokenizer.save_pretrained(folder) if Path(path).is_file()]
    _write(folder, _adapted(folder, {TOKENIZER: adapted}))
    return written


def _write(folder: Path, changed: Mapping[str, dict[str, Any] | None]) -> None:
    for name, content in changed.items():
        if content is not None:
            (folder / name).unlink()
            write_text(folder / name, json.dumps(content, indent=2))  # infinity and NaN stay


def _adapted(
    folder: Path, adapters: Mapping[str, Callable[[Any], dict[str, Any]]] | None = None
) -> dict[str, dict[str, Any] | None]:
    """The configurations of ``folder``, by default for both major versions; None if no change is needed."""
    adapters = adapters or {**_NEUTRAL, CONFIG: readable_config, TOKENIZER: readable_tokenizer_config}
    changed: dict[str, dict[str, Any] | None] = {}
    for name, adapt in adapters.items():
        if (folder / name).is_file():
            content = read_json(folder / name, f"{name} of the model", "download the model again")
            adapted = adapt(content) if isinstance(content, dict) else content
            changed[name] = None if adapted == content else adapted
    return changed


def readable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` (a ``config.json``) with the missing keys of transformers 4 added to those of 5.

    A choice of implementations is left out.
    """
    config = without_choices(config)
    adapted = {
        key: readable_config(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
    }
    if isinstance(config.get("dtype"), str):
        adapted.setdefault("torch_dtype", config["dtype"])
    # onnxruntime-genai's builder reads only this name, also for a LayerNorm, and uses 1e-6 if it is missing.
    epsilon = next((config[name] for name in _EPSILON_NAMES if config.get(name) is not None), None)
    if epsilon is not None:
        adapted.setdefault("rms_norm_eps", epsilon)
    rope = config.get("rope_parameters")
    for key, value in (_rope_of_4(rope, config) if isinstance(rope, dict) else {}).items():
        if adapted.get(key) is None:
            adapted[key] = value
    return adapted


def _rope_of_4(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    by_layer = {kind: rope[kind] for kind in _BASE_NAMES if isinstance(rope.get(kind), dict)}
    found = {
        name: rope[key] for key, names in _ROPE_NAMES.items() if rope.get(key) is not None for name in names
    }
    for kind, own in by_layer.items():
        found |= {name: own["rope_theta"] for name in _BASE_NAMES[kind] if "rope_theta" in own}
    scaled = by_layer.get("full_attention", rope)
    rope_type = scaled.get("rope_type", scaled.get("type", "default"))
    # Keys in the configuration itself are read from there.
    extra = {k: v for k, v in scaled.items() if k not in (*_ROPE_NAMES, "rope_type", "type", *config)}
    named = {_TYPE_NAMES.get(rope_type, "rope_type"): rope_type, **extra}
    # An explicit null, because a few families scale if the key is missing.
    return {**found, "rope_scaling": None if rope_type == "default" else named}


def readable_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` (a ``tokenizer_config.json``) with a class and special tokens that both major versions know.

    Paths of files are left out.
    """
    adapted = without_files(config)
    if (name := str(config.get("tokenizer_class"))) in _TOKENIZER_CLASSES:
        adapted["tokenizer_class"] = _TOKENIZER_CLASSES[name]
    if isinstance(config.get("extra_special_tokens"), list):
        adapted["additional_special_tokens"] = adapted.pop("extra_special_tokens")
    return adapted
