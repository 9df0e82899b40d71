"""Turn frozen dataclasses into JSON and back: what reports and other files of ours hold.

JSON has no NaN and no infinity: they are the strings ``"nan"``, ``"inf"`` and ``"-inf"`` there, and numbers here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

from nbl_export.blocks import Block
from nbl_export.blocks import from_json as block_from_json
from nbl_export.errors import InputError
from nbl_export.files import jsonable

if TYPE_CHECKING:
    from cattrs import Converter

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
    from cattrs import transform_error
    from cattrs.errors import BaseValidationError

    try:
        return _converter().structure(raw, kind)
    except (BaseValidationError, TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        first = transform_error(error)[0] if isinstance(error, BaseValidationError) else str(error)
        shown = first if len(first) <= _SHOWN else f"{first[:_SHOWN]}…"
        raise InputError(f"{what} is damaged ({shown}): {remedy}.") from None


def part_from_json(kind: type[T], raw: Mapping[str, Any], what: str, remedy: str) -> T:
    """As :func:`from_json`, of an object that may have other fields too."""
    return from_json(kind, {name: raw[name] for name in get_type_hints(kind) if name in raw}, what, remedy)


@cache
def _converter() -> Converter:
    from cattrs import Converter

    converter = Converter(forbid_extra_keys=True)
    for kind in (str, bool, int):
        converter.register_structure_hook(kind, _exactly)
    converter.register_structure_hook(float, _number)
    converter.register_structure_hook(Block, lambda value, _: block_from_json(value))
    converter.register_structure_hook(
        Block | None, lambda value, _: None if value is None else block_from_json(value)
    )
    return converter


def _exactly(value: Any, kind: type[Any]) -> Any:
    # True is an int in Python, and no count.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{value!r:.100} is not of type {kind.__name__}")
    return value


def _number(value: Any, _kind: type[Any]) -> float:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or value in ("nan", "inf", "-inf")):
        raise TypeError(f"{value!r:.100} is not a number")
    return float(value)
