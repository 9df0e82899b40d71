"""The task of a model, by its head: rows of ``tasks.toml``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nbl_export.batch.names import PIXELS, TOKENS
from nbl_export.datafile import read_table

# A configuration with one of these keys is of a vision model.
_OF_IMAGES = ("image_size", "num_channels")


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


GENERATION, FEATURES = "text-generation", "feature-extraction"


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
    if not architectures:
        return task_named(GENERATION)
    fits = [
        (len(ending), task)
        for task in _rows().values()
        for ending in task.architectures
        for name in architectures
        if name.endswith(ending)
    ]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None


def reads(task: Task, config: Mapping[str, Any]) -> str:
    """The main input of a model with ``config`` (a ``config.json``): token ids or pixels."""
    if len(task.reads) == 1:
        return task.reads[0]
    return PIXELS if any(key in config for key in _OF_IMAGES) else TOKENS


def nests(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` has the configurations of other models in it, as a multimodal model's has."""
    return bool(nested(config))


def nested(config: Mapping[str, Any]) -> list[str]:
    """The keys of a ``config.json`` that have the configurations of other models."""
    return [
        key
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, Mapping) and "model_type" in value
    ]


def heads() -> str:
    """The endings of all supported class names, for a message."""
    return ", ".join(f"…{ending}" for task in _rows().values() for ending in task.architectures)


@cache
def _rows() -> dict[str, Task]:
    table = read_table(Path(__file__).parent / "tasks.toml")
    return {name: _row(name, **row) for name, row in table.items()}


def _row(
    name: str, architectures: list[str], reads: list[str], outputs: dict[str, list[str]], **rest: Any
) -> Task:
    dims = {output: tuple(names) for output, names in outputs.items()}
    return Task(name, tuple(architectures), reads=tuple(reads), outputs=dims, **rest)
