"""Turn frozen dataclasses into JSON and back; record what a finished stage was made of, and the key that says so.

JSON has no NaN and no infinity: they are the strings ``"nan"``, ``"inf"`` and ``"-inf"`` there, and numbers here.

A stage's key is the hash of all its inputs: its settings, the results of the stages it reads, digests of other inputs,
and its own version. A stage's result is the hash of its key and of the files it wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_type_hints

from cattrs import Converter, transform_error
from cattrs.errors import BaseValidationError

from nbl_export.blocks import Block
from nbl_export.blocks import from_json as block_from_json
from nbl_export.errors import InputError
from nbl_export.files import jsonable, sha256_of_json

T = TypeVar("T")
_SHOWN = 300  # characters of what is wrong

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One verdict: ``detail`` says what was measured, or why it was skipped.

    ``seconds`` is how long that took, when it was measured; None where no clock ran, or where another check of the same
    measurement has them.
    """

    name: str
    status: Status
    detail: str
    seconds: float | None = None


def to_json(value: Any) -> dict[str, Any]:
    """A dataclass as a JSON object: its fields, and those of the dataclasses in it."""
    return dict(jsonable(value))


def from_json(kind: type[T], raw: Any, what: str, remedy: str) -> T:
    """The dataclass ``kind`` from a JSON object; fields that are missing take their defaults.

    Raises :class:`InputError`, which calls it ``what`` and says the ``remedy``, for a field that is unknown, is missing
    without a default, or has another type.
    """
    try:
        return _CONVERTER.structure(raw, kind)
    except (BaseValidationError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        first = transform_error(error)[0] if isinstance(error, BaseValidationError) else str(error)
        shown = first if len(first) <= _SHOWN else f"{first[:_SHOWN]}…"
        raise InputError(f"{what} is damaged ({shown}): {remedy}.") from None


def part_from_json(kind: type[T], raw: Mapping[str, Any], what: str, remedy: str) -> T:
    """As :func:`from_json`, of an object that may have other fields too."""
    return from_json(kind, {name: raw[name] for name in get_type_hints(kind) if name in raw}, what, remedy)


def _exactly(value: Any, kind: type[Any]) -> Any:
    # True is an int in Python, and no count.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{value!r:.100} is not of type {kind.__name__}")
    return value


def _number(value: Any, _kind: type[Any]) -> float:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in ("nan", "inf", "-inf")):
        raise TypeError(f"{value!r:.100} is not a number")
    return float(value)


_CONVERTER = Converter(forbid_extra_keys=True)
for _kind in (str, bool, int):
    _CONVERTER.register_structure_hook(_kind, _exactly)
_CONVERTER.register_structure_hook(float, _number)
_CONVERTER.register_structure_hook(Block, lambda value, _: block_from_json(value))
_CONVERTER.register_structure_hook(
    Block | None, lambda value, _: None if value is None else block_from_json(value)
)


# The version of each stage, in the order of the stages. It is raised whenever the same inputs give another result, as
# after a corrected fit: what an earlier version made is then made again.
STAGES = {
    "calibrate": 3,
    "select": 5,
    "export": 2,
    "rewrite": 3,
    "build": 1,
    "verify": 2,
    "eval": 1,
    "bench": 1,
    "convert": 1,
}


def kind_of(stage: str) -> str:
    """The one of :data:`STAGES` that ``stage`` is: each form of ``convert`` is one, as ``convert gguf fp16``."""
    return stage.partition(" ")[0]


# Inputs that are no stages: the model as it is loaded, and its files that only travel with a graph.
MODEL, SIDECARS = "model", "sidecars"
_INPUTS = {
    MODEL: "the model's tokenizer, code or other files have changed",
    SIDECARS: "the model's generation configuration or chat template has changed",
}


@dataclass(frozen=True)
class StageRecord:
    """The record of a finished stage.

    ``files`` maps paths relative to the output folder to their SHA-256; ``seconds`` is its wall time; ``notes`` are the
    lines shown to the user (fallbacks, shortages), recorded for the report. ``made_of`` is what it read: results of
    other stages by their names, and digests of other inputs. ``version`` 0 is that of folders that do not record it.
    ``dropped`` are those of its files that were deleted later on purpose.

    ``device`` is what PyTorch ran on, empty where it ran no model or an older version did. It is no input: what was
    made on a GPU is used where there is none, so ``select`` and all after it go on from moments of any device. What
    only measures (``verify``, ``eval``) is of its device, which then is one of its settings.
    """

    key: str
    settings: dict[str, Any]
    files: dict[str, str]
    seconds: float
    notes: tuple[str, ...] = ()
    made_of: dict[str, str] = field(default_factory=dict)
    version: int = 0
    device: str = ""
    dropped: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        """SHA-256 of its inputs and of what it wrote: what a stage that reads it is made of."""
        return sha256_of_json([self.key, self.files])

    def other_inputs(self, stage: str, settings: Mapping[str, Any], made_of: Mapping[str, str]) -> str | None:
        """In words, which inputs are others than ``settings`` and ``made_of``; None if none are."""
        if self.version != STAGES[kind_of(stage)]:
            return "it was made by another version of nbl-export"
        if key_of(stage, self.settings, self.made_of) != self.key:
            return "its record was changed"
        if changed := _others(self.made_of, made_of):
            return input_in_words(changed[0])
        asked = _others(self.settings, settings)
        return f"it was made with another {asked[0]}" if asked else None


def key_of(stage: str, settings: Mapping[str, Any], made_of: Mapping[str, str]) -> str:
    """The key of ``stage`` with these inputs."""
    return sha256_of_json(
        {
            "stage": stage,
            "version": STAGES[kind_of(stage)],
            "settings": dict(settings),
            "made_of": dict(made_of),
        }
    )


def input_in_words(name: str) -> str:
    """That the input ``name`` of a stage is another one."""
    if name in STAGES:
        return f"`{name}` was done again"
    return _INPUTS.get(name, f"its {name} changed")


def _others(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names whose values differ; a tuple comes back from JSON as a list."""
    absent = object()
    return sorted(k for k in {*one, *other} if jsonable(one.get(k, absent)) != jsonable(other.get(k, absent)))
