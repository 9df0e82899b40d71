"""Read the task of a model by its head, rows of ``tasks.toml``, and the pooling of a sentence-transformers folder.

modules.json          Transformer, Pooling, optionally Normalize, in this order
1_Pooling/config.json the mode: mean, cls, max or lasttoken over the tokens that are not padding
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nbl_export.batch.names import PIXELS, TOKENS
from nbl_export.errors import InputError
from nbl_export.files import member, read_json, read_table
from nbl_export.models.folder import AGAIN

# A configuration with one of these keys is of a vision model.
_OF_IMAGES = ("image_size", "num_channels")
_MODULES = "modules.json"
# The names of the modes in the two formats of sentence-transformers, and ours.
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
GENERATION, FEATURES = "text-generation", "feature-extraction"


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
def _rows() -> dict[str, Task]:
    table = read_table(Path(__file__).parent / "tasks.toml")
    for row in table.values():
        row |= {key: tuple(row[key]) for key in ("architectures", "reads")}
        row["outputs"] = {output: tuple(dims) for output, dims in row["outputs"].items()}
    return {name: Task(name, **row) for name, row in table.items()}


def task_named(name: str) -> Task:
    """The row called ``name``."""
    return _rows()[name]


def is_causal(name: str) -> bool:
    """Whether ``name``, which a file may say, is the task of models that generate text."""
    return name in _rows() and _rows()[name].causal


def task_of(architectures: Sequence[str]) -> Task | None:
    """The task of the class names in a configuration; None for a head that is not in the table.

    A configuration without class names is assumed to be a decoder's.
    """
    fits = [
        (len(ending), task)
        for task in _rows().values()
        for ending in task.architectures
        for name in architectures or ("ForCausalLM",)
        if name.endswith(ending)
    ]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None


def reads(task: Task, config: Mapping[str, Any]) -> str:
    """The main input of a model with ``config`` (a ``config.json``): token ids or pixels."""
    if len(task.reads) == 1:
        return task.reads[0]
    return PIXELS if any(key in config for key in _OF_IMAGES) else TOKENS


def nested(config: Mapping[str, Any]) -> list[str]:
    """The keys of a ``config.json`` that have the configurations of other models, as a multimodal model's has."""
    return [
        key
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, Mapping) and "model_type" in value
    ]


def heads() -> str:
    """The endings of all supported class names, for a message."""
    return ", ".join(f"…{ending}" for task in _rows().values() for ending in task.architectures)


@dataclass(frozen=True)
class Pooling:
    """``mode`` is mean, cls, max or lasttoken; ``normalize`` scales every vector to length 1.

    ``files`` are the files that define this, relative to the folder.
    """

    mode: str
    normalize: bool
    files: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


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
