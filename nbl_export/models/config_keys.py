"""What a model folder may not decide: the weight file that is opened, what is imported or fetched, implementations.

transformers obeys keys of ``config.json``, and files beside it, that do this without ``trust_remote_code``. A folder
that names another file is refused; a choice of an implementation is left out, since ordinary fine-tunes carry one, and
so are paths of a tokenizer's files on the machine where it was saved.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError

# transformers computes with these, or gets native code for them from the Hub; without them it takes its own default.
_CHOICES = frozenset(
    f"{private}{part}_implementation{internal}"
    for part in ("attn", "experts")
    for private, internal in (("", ""), ("_", ""), ("_", "_internal"))
) | {"fusion_config"}
# Weight formats that transformers can load but that cannot be linearized directly.
QUANTIZED = (
    "a quantized checkpoint ({method!s:.100}): dequantize it first, or use the original or a GGUF file"
)
_QUANTIZATION = ("quantization_config", "compression_config")
# Attributes of Python; the float is how transformers writes infinity and NaN.
_PYTHON = re.compile(r"__(?!float__$)\w+__")
_DEEPEST = 100  # dictionaries and lists in a configuration
# Arguments of tokenizers that are paths of files; each finds its files in the folder without being told.
_FILE = re.compile(r"\w+_(file|ckpt|file_torch)|(\w+_)?vocab|merges|(source|target)_spm")
_POSITIONAL = "init_inputs"  # the same as a list without names
_ADAPTER = "adapter_config.json"
# transformers opens files of this name instead of model.safetensors.
_RANK = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def without_choices(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` (a ``config.json``) without the keys that choose an implementation, at any depth."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: cleaned(v) for k, v in value.items() if k not in _CHOICES}
        return [cleaned(v) for v in value] if isinstance(value, list) else value

    return {k: cleaned(v) for k, v in config.items() if k not in _CHOICES}


def without_files(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` (a ``tokenizer_config.json`` or ``special_tokens_map.json``) without paths of files."""
    return {
        name: value
        for name, value in config.items()
        if name != _POSITIONAL and not (isinstance(value, str) and _FILE.fullmatch(name))
    }


def check_keys(source: str, config: Mapping[str, Any], towers: bool = False) -> None:
    """Refuse a configuration that names another weight file or a model elsewhere; raises :class:`InputError`.

    With ``towers`` one of them may be timm's, since none is built.
    """
    for name, value in _entries(config):
        where = f"{source}: config.json has {name}"
        if name == "transformers_weights" and value is not None:
            raise InputError(
                f"{where} {value!r:.100}, another file to load: put those weights into model.safetensors and remove "
                "the key."
            )
        if name == "attribute_map" or _PYTHON.fullmatch(name):
            raise InputError(f"{where}, which renames other keys: remove it.")
        if (name == "backbone" and isinstance(value, str)) or (
            name == "model_type"
            and isinstance(value, str)
            and value.startswith("timm_")
            and not (towers and value == "timm_wrapper")
        ):
            raise InputError(
                f"{where} {value!r:.100}, a model of another library or folder: only models whose code is in "
                "transformers and whose weights are in the folder are supported."
            )
        if name in _QUANTIZATION and isinstance(value, Mapping):
            method = quantized_by(value)
            if method is not None:
                raise InputError(f"{source} is {QUANTIZED.format(method=method)}.")
    if "pretrained_cfg" in config and "model_type" not in config:
        raise InputError(f"{source} is a model of timm, which is not supported: save it with transformers.")


def quantized_by(quantization: Mapping[str, Any]) -> Any:
    """The method of a ``quantization_config``; None if its weights are ordinary ones, as those read from GGUF are."""
    if quantization.get("load_in_8bit") or quantization.get("load_in_4bit"):
        return "bitsandbytes"
    method = quantization.get("quant_method")
    return None if method == "gguf" else method


def check_beside(source: str, folder: Path) -> None:
    """Refuse files that transformers would load instead of, or on top of, model.safetensors."""
    if (folder / _ADAPTER).exists():
        raise InputError(
            f"{source} has an adapter ({_ADAPTER}), which is loaded or not, depending on what is installed: merge it "
            "into the model (merge_and_unload of peft), or remove that file."
        )
    ranks = sorted(p.name for p in folder.glob("shard-*.safetensors") if _RANK.fullmatch(p.name))
    if ranks:
        raise InputError(
            f"{source} has weights of a distributed run ({ranks[0]}): save the model with `save_pretrained` of "
            "transformers on one process."
        )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of the dictionaries in ``value``, which was read from JSON, with what it has."""
    stack = [(value, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > _DEEPEST:
            raise InputError(f"config.json is nested more than {_DEEPEST} deep: download the model again.")
        if isinstance(node, Mapping):
            yield from node.items()
            node = list(node.values())
        if isinstance(node, list):
            stack.extend((inner, depth + 1) for inner in node)
