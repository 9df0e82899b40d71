"""A model as a Hugging Face folder that another process, with transformers 4 or 5, loads as the same model.

transformers 5 writes configurations that 4 reads without an error and wrongly: the rotary embedding's
settings moved into ``rope_parameters``, which 4 passes over, so that a model trained with another base
than 10,000 becomes a different one. Its tokenizers carry a class name that 4 does not know. The folder
handed over spells both the old way and the new; 5 reads the same from either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.models.load import quiet
from nbl_export.workspace import read_json, write_json

if TYPE_CHECKING:
    from nbl_export.run import LoadedModel

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
# What a loader may open; pickled weights are left behind, as everywhere.
_HANDED_OVER = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py")

_EPSILON_NAMES = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")

# The names by which transformers 4 knows what 5 keeps in rope_parameters; each family reads its own.
_ROPE_NAMES = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
# The same for families whose layers of one kind rotate by another base than those of the other.
_BASE_NAMES = {
    "full_attention": ("rope_theta", "global_rope_theta"),
    "sliding_attention": ("rope_local_base_freq", "local_rope_theta"),
}
# Phi's long rotary embedding takes its type under the oldest name, and nothing beside its factors.
_TYPE_NAMES = {"longrope": "type"}
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def handoff(model: LoadedModel, folder: Path) -> Path:
    """``model`` as a folder for both majors of transformers: its own where that will do, else ``folder``.

    ``folder`` (new or empty, the caller's to delete) gets links to the weights, or the de-quantized
    weights of a GGUF file in float32. The source is never written to, the loaded model never changed.
    """
    source = Path(model.source.path)
    if model.source.gguf_file is None and not any(_adapted(source).values()):
        return source
    folder.mkdir(parents=True, exist_ok=True)
    if model.source.gguf_file is None:
        for path in sorted({p for pattern in _HANDED_OVER for p in source.glob(pattern)}):
            (folder / path.name).symlink_to(path.resolve())
    else:
        _save(model, folder)
    for name, content in _adapted(folder).items():
        if content is not None:
            (folder / name).unlink()  # it may be a link into the source
            write_json(folder / name, content)
    return folder


def _save(model: LoadedModel, folder: Path) -> None:
    loaded: Any = model.model
    before = dict(vars(loaded.config))
    try:
        with quiet():
            loaded.save_pretrained(folder)  # writes down in the configuration what it saved
            model.tokenizer.save_pretrained(folder)
    finally:
        vars(loaded.config).clear()
        vars(loaded.config).update(before)


def _adapted(folder: Path) -> dict[str, dict[str, Any] | None]:
    """The two configurations of ``folder`` as both majors read them; None where they are that already."""
    changed: dict[str, dict[str, Any] | None] = {}
    for name, adapt in ((CONFIG, readable_config), (TOKENIZER, readable_tokenizer_config)):
        if (folder / name).is_file():
            content = read_json(folder / name, f"{name} of the model", "fetch the model again")
            adapted = adapt(content)
            changed[name] = None if adapted == content else adapted
    return changed


def readable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` (a ``config.json``) with the keys of transformers 4 beside those of 5; what is there stays."""
    adapted = {
        key: readable_config(value) if isinstance(value, dict) and key.endswith("_config") else value
        for key, value in config.items()
    }
    if isinstance(config.get("dtype"), str):
        adapted.setdefault("torch_dtype", config["dtype"])
    # onnxruntime-genai's builder reads this name only, also for a LayerNorm, and takes 1e-6 where it is missing.
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
    # What stands in the configuration itself is read there.
    extra = {k: v for k, v in scaled.items() if k not in (*_ROPE_NAMES, "rope_type", "type", *config)}
    named = {_TYPE_NAMES.get(rope_type, "rope_type"): rope_type, **extra}
    # An explicit null: a few families scale where nothing is said.
    return {**found, "rope_scaling": None if rope_type == "default" else named}


def readable_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` (a ``tokenizer_config.json``) with a class and special tokens that both majors know."""
    adapted = dict(config)
    if (name := str(config.get("tokenizer_class"))) in _TOKENIZER_CLASSES:
        adapted["tokenizer_class"] = _TOKENIZER_CLASSES[name]
    if isinstance(config.get("extra_special_tokens"), list):
        adapted["additional_special_tokens"] = adapted.pop("extra_special_tokens")
    return adapted
