"""Read what a model folder says: its task and pooling, its weight files, configurations for both major versions.

The task is a row of ``tasks.toml``, by the model's head; the pooling that of sentence-transformers:

    modules.json          Transformer, Pooling, optionally Normalize, in this order
    1_Pooling/config.json the mode: mean, cls, max or lasttoken over the tokens that are not padding

transformers obeys keys of ``config.json`` that choose an implementation, also one that is fetched, without
``trust_remote_code``. Ordinary fine-tunes carry such choices, and paths of a tokenizer's files on the machine where it
was saved: :func:`readable` leaves both out. :func:`readable_folder` is for other processes, with transformers 4: that
ignores ``rope_parameters`` without an error, and does not know the class of a tokenizer of 5.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError
from nbl_export.files import member, read_json, read_table, write_text

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
_MODULES = "modules.json"
# The names of the modes in the two formats of sentence-transformers, and ours.
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
GENERATION, FEATURES = "text-generation", "feature-extraction"


# tasks and pooling --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A row of the table; the fields are those of the file."""

    name: str
    architectures: tuple[str, ...]
    loads: str
    reads: tuple[str, ...]
    outputs: Mapping[str, tuple[str, ...]]
    causal: bool = False
    pools: bool = False


@cache
def tasks() -> dict[str, Task]:
    """The table, by name."""
    table = read_table(Path(__file__).parent / "tasks.toml")
    for row in table.values():
        row |= {key: tuple(row[key]) for key in ("architectures", "reads")}
        row["outputs"] = {output: tuple(dims) for output, dims in row["outputs"].items()}
    return {name: Task(name, **row) for name, row in table.items()}


def task_named(name: str) -> Task:
    """The row called ``name``."""
    return tasks()[name]


def is_causal(name: str) -> bool:
    """Whether ``name``, which a file may say, is the task of models that generate text."""
    return name in tasks() and tasks()[name].causal


def task_of(architectures: Sequence[str]) -> Task | None:
    """The task of the class names in a configuration; None for a head that is not in the table.

    A configuration without class names is assumed to be a decoder's.
    """
    fits = [
        (len(ending), task)
        for task in tasks().values()
        for ending in task.architectures
        for name in architectures or ("ForCausalLM",)
        if name.endswith(ending)
    ]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None


def nested(config: Mapping[str, Any]) -> list[str]:
    """The keys of a ``config.json`` that have the configurations of other models, as a multimodal model's has."""
    return [
        key
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, Mapping) and "model_type" in value
    ]


@dataclass(frozen=True)
class Pooling:
    """``mode`` is mean, cls, max or lasttoken; ``normalize`` scales every vector to length 1.

    ``files`` are the files that define this, relative to the folder.
    """

    mode: str
    normalize: bool
    files: tuple[str, ...]


def find_pooling(folder: Path) -> Pooling | None:
    """The pooling of a sentence-transformers ``folder``; None for a folder without ``modules.json``.

    Raises :class:`InputError` for a module or a mode that is not supported.
    """
    if not (folder / _MODULES).is_file():
        return None
    modules = read_json(folder / _MODULES, "The list of the model's modules", AGAIN)
    try:
        named = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in modules]
    except (TypeError, KeyError):
        raise InputError(f"{folder / _MODULES} is not a list of modules: {AGAIN}.") from None
    kinds = [kind for kind, _ in named]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            f"{folder / _MODULES} has the modules {', '.join(kinds) or 'none'}: supported are a Transformer, its "
            "Pooling, and Normalize, in this order."
        )
    path = member(folder, f"{named[1][1]}/config.json", f"The path of the pooling in {_MODULES}")
    config = read_json(path, "The pooling's configuration", AGAIN)
    given = config if isinstance(config, dict) else {}
    asked = [
        given.get("pooling_mode"),
        *(k for k in given if k.startswith("pooling_mode_") and given[k] is True),
    ]
    modes = [_MODES.get(str(key), str(key)) for key in asked if key]
    if len(modes) != 1 or modes[0] not in _MODES.values():
        raise InputError(
            f"{path} asks for the pooling {', '.join(modes) or 'none'}: supported is one of mean, cls, max and "
            "lasttoken."
        )
    files = [_MODULES, str(path.relative_to(folder))]
    # Not needed to run, but sentence-transformers reads them.
    files += [p.name for p in sorted(folder.glob("*sentence*.json"))]
    return Pooling(modes[0], len(kinds) == 3, tuple(files))


# files --------------------------------------------------------------------------------------------


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
