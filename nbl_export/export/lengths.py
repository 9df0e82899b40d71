"""For which lengths of text a traced graph is the model: `torch.export` follows one branch of the model's code.

Of a branch on a length ("longer than the window?") the graph has the side of the short text that is traced. What that
takes for granted is left beside the program, as conditions on the sizes of its inputs. They are evaluated here, up to
the longest text of the model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from nbl_export.batch.names import BATCH, MAX, PAST, SEQUENCE, TOTAL
from nbl_export.errors import InputError
from nbl_export.models.layers import positions

# The longest text that is looked at of a model without a limit.
_LONGEST = 1 << 17
# As few as the trace is made for: it takes for granted that no size is 0 or 1, which makes no difference to a graph.
_FEWEST = 4


class Branches(InputError):
    """A model computes longer texts in another way than those that it is traced with."""


def check_lengths(
    program: torch.export.ExportedProgram,
    forward: Callable[..., Any],
    arguments: Sequence[Any],
    named: Sequence[Any],
    model: torch.nn.Module,
    cached: bool,
) -> None:
    """Raise :class:`Branches` unless ``program`` holds for all texts of up to the positions of ``model``.

    ``arguments`` of ``forward`` were traced with, ``named`` has the names of their dynamic axes.
    """
    longest = positions(model) or _LONGEST
    texts = list(getattr(program, "_guards_code", None) or ())
    every = [compile(text, "<condition>", "eval") for text in texts]
    # That a size is not one number is hardly a branch, and not where one begins.
    ranges = [condition for condition, text in zip(every, texts, strict=True) if "!=" not in text]
    names = list(inspect.signature(forward).parameters)

    def holds(tokens: int, conditions: list[Any] = every) -> bool:
        for sizes in _sizes(tokens, cached):
            given = [_sized(argument, axes, sizes) for argument, axes in zip(arguments, named, strict=True)]
            scope = {"L": dict(zip(names, given, strict=False)), "math": math, "torch": torch}
            if not all(_true(condition, scope) for condition in conditions):
                return False
        return True

    short, long = _FEWEST, None
    for tokens in _looked_at(longest):
        # A condition that fails at one length alone, as "not as long as the table", is no branch.
        if not holds(tokens) and not holds(tokens + 1):
            long = tokens
            break
        short = tokens
    if long is None:
        return
    of_ranges = ranges if not holds(long, ranges) else every
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (middle, long) if holds(middle, of_ranges) else (short, middle)
    raise Branches(
        f"{type(model).__name__} computes texts of more than {short:,} tokens in another way than shorter ones, "
        "by a branch of its code, and a graph would hold the way of the shorter ones alone: it is not supported yet."
    )


def _looked_at(longest: int) -> Iterator[int]:
    """Lengths up to ``longest`` - 1, since the next one is looked at, too."""
    power = _FEWEST
    while power < longest:
        for tokens in (power, power + power // 2 + 1):
            if tokens < longest - 1:
                yield tokens
        power *= 2
    if longest > _FEWEST:
        yield longest - 1


def _sizes(tokens: int, cached: bool) -> Iterator[Mapping[str, int]]:
    """The sizes of inputs that hold ``tokens`` tokens: with a cache most of them new, half of them, few."""
    for new in (tokens - 2, tokens // 2, 2) if cached else (tokens,):
        yield {BATCH: 3, SEQUENCE: new, PAST: tokens - new, TOTAL: tokens, MAX: tokens}


class _Sized:
    """What a condition knows of an input."""

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)

    def size(self) -> tuple[int, ...]:
        return self._shape


def _sized(argument: Any, axes: Any, sizes: Mapping[str, int]) -> Any:
    if isinstance(argument, list | tuple):
        return [_sized(part, of, sizes) for part, of in zip(argument, axes, strict=True)]
    return _Sized([sizes.get(axes.get(axis), size) for axis, size in enumerate(argument.shape)])


def _true(condition: Any, scope: dict[str, Any]) -> bool:
    try:
        return bool(eval(condition, scope))  # torch's own words about the sizes of inputs
    except Exception:  # of what is not known here
        return True
