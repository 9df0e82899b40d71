"""Read the files of a model folder: which hold its weights, and configurations as both major versions read them.

transformers obeys keys of ``config.json`` that choose an implementation, also one that is fetched, without
``trust_remote_code``. Ordinary fine-tunes carry such choices, and paths of a tokenizer's files on the machine where it
was saved: :func:`readable` leaves both out. :func:`readable_folder` is for other processes, with transformers 4: that
ignores ``rope_parameters`` without an error, and does not know the class of a tokenizer of 5.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError
from nbl_export.files import member, read_json, write_text

AGAIN = "download the model again"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, TOKENIZER, SPECIAL = "config.json", "tokenizer_config.json", "special_tokens_map.json"
PREPROCESSOR = "preprocessor_config.json"
_VOCABULARIES = (*("tokenizer.json", "*vocab*", "*merges*", "*.model", "*.tiktoken", "*.bpe", "tekken.json"),)
# The files that a loader may open; pickled weights are never used.
_HANDED_OVER = (
    *("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"),
    *("*.tiktoken", "*.spm", "*.bpe", "*.codes", "*.vocab", "tokenizer.model.*"),
)
# transformers computes with these, or gets native code for them from the Hub.
_CHOICE = re.compile(r"_?(attn|experts)_implementation(_internal)?|fusion_config")
# Arguments of tokenizers that are paths of files; each finds its files in the folder without being told.
_FILE = re.compile(r"\w+_(file|ckpt|file_torch)|(\w+_)?vocab|merges|(source|target)_spm")
_POSITIONAL = "init_inputs"  # the same as a list without names
# Keys by which transformers reads another file or model, or another key in the place of one.
_ELSEWHERE = ("transformers_weights", "backbone", "attribute_map")
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
_Adapt = Callable[[dict[str, Any]], dict[str, Any]]


def weight_files(folder: Path) -> list[Path]:
    """The weight files that loading opens; raises :class:`InputError` for a list with names of none in the folder."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [path for path in (folder / WEIGHTS,) if path.is_file()]
    found = {member(folder, name, f"A file in {INDEX}") for name in weight_names(folder)}
    for path in found:
        if path.suffix != ".safetensors" or not path.is_file():
            raise InputError(f"{path} is not there as a .safetensors file, {INDEX} names it: {AGAIN}.")
    return sorted(found, key=lambda path: (path.parent != folder, path))


def weight_names(folder: Path) -> set[str]:
    """The names in the list of the weight files; raises :class:`InputError` for a file that is none."""
    index = read_json(folder / INDEX, "The list of the model's weight files", AGAIN)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        raise InputError(f"{folder / INDEX} has no weight_map: {AGAIN}.")
    return {str(name) for name in names.values()}


def has_vocabulary(folder: Path) -> bool:
    """Whether a model folder has a file that a tokenizer reads its vocabulary from, by the names that are used."""
    return any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES)


def check_keys(source: str, folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that names other weights or a model elsewhere, and an adapter beside the model."""
    stack: list[Any] = [config]
    while stack:
        node = stack.pop()
        for name, value in node.items() if isinstance(node, dict) else ():
            if (
                name in _ELSEWHERE
                and value is not None
                and not (name == "backbone" and isinstance(value, dict))
            ):
                raise InputError(
                    f"{source}: config.json has {name} {value!r:.100}, by which something else would be read: only "
                    "models whose code is in transformers and whose weights are in model.safetensors are supported."
                )
        stack += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{source} has an adapter (adapter_config.json), which is loaded or not, depending on what is installed: "
            "merge it into the model (merge_and_unload of peft), or remove that file."
        )


def without_choices(config: Any) -> Any:
    """``config`` (a ``config.json``) without the keys that choose an implementation, at any depth."""
    if isinstance(config, Mapping):
        return {k: without_choices(v) for k, v in config.items() if not _CHOICE.fullmatch(k)}
    return [without_choices(value) for value in config] if isinstance(config, list) else config


def _without_files(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in config.items()
        if name != _POSITIONAL and not (isinstance(value, str) and _FILE.fullmatch(name))
    }


@contextmanager
def readable(source: Path) -> Iterator[str]:
    """The model folder ``source``, or one with links to its files if it chooses implementations or names files."""
    with tempfile.TemporaryDirectory() as scratch:
        adapters = {CONFIG: without_choices, TOKENIZER: _without_files, SPECIAL: _without_files}
        yield str(_linked(source, Path(scratch) / source.name, _adapted(source, adapters)))


def readable_folder(source: Path, folder: Path) -> Path:
    """The model folder ``source`` if both major versions read it, else ``folder`` with links to its files."""
    return _linked(source, folder, _adapted(source, _FOR_BOTH))


def make_readable(folder: Path) -> None:
    """Write the configurations in ``folder`` with both sets of keys; a link is replaced, its target unchanged."""
    _write(folder, _adapted(folder, _FOR_BOTH))


def save_tokenizer(tokenizer: Any, folder: Path) -> list[Path]:
    """Write ``tokenizer``, or a processor of images, into ``folder`` for both major versions; returns its files."""

    def adapted(config: dict[str, Any]) -> dict[str, Any]:
        found = readable_tokenizer_config(config)
        if found.get("tokenizer_class") != config.get("tokenizer_class"):
            # The class that 4 knows gives token types, too, unless it is told which inputs there are.
            found.setdefault("model_input_names", list(tokenizer.model_input_names))
        return found

    written = [Path(path) for path in tokenizer.save_pretrained(folder) if Path(path).is_file()]
    _write(folder, _adapted(folder, {TOKENIZER: adapted}))
    return written


def _linked(source: Path, folder: Path, changed: Mapping[str, dict[str, Any]]) -> Path:
    if not changed:
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


def _write(folder: Path, changed: Mapping[str, dict[str, Any]]) -> None:
    for name, content in changed.items():
        (folder / name).unlink()
        write_text(folder / name, json.dumps(content, indent=2))  # infinity and NaN stay


def _adapted(folder: Path, adapters: Mapping[str, _Adapt]) -> dict[str, dict[str, Any]]:
    """The configurations of ``folder`` that ``adapters`` change."""
    changed: dict[str, dict[str, Any]] = {}
    for name, adapt in adapters.items():
        if (folder / name).is_file():
            content = read_json(folder / name, f"{name} of the model", AGAIN)
            if isinstance(content, dict) and (adapted := adapt(content)) != content:
                changed[name] = adapted
    return changed


def readable_config(config: dict[str, Any]) -> dict[str, Any]:
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
    """``config`` (a ``tokenizer_config.json``) with a class and special tokens that both major versions know."""
    adapted = _without_files(config)
    if (name := str(config.get("tokenizer_class"))) in _TOKENIZER_CLASSES:
        adapted["tokenizer_class"] = _TOKENIZER_CLASSES[name]
    if isinstance(config.get("extra_special_tokens"), list):
        adapted["additional_special_tokens"] = adapted.pop("extra_special_tokens")
    return adapted


_FOR_BOTH: dict[str, _Adapt] = {
    CONFIG: readable_config,
    TOKENIZER: readable_tokenizer_config,
    SPECIAL: _without_files,
}
