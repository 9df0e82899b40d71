"""Optimization profiles: the shapes an engine is built for, in prefill and in decode.

A profile gives each symbolic dimension a minimum, an optimum and a maximum. The shapes of all inputs are derived
from these, so ids, mask, positions and cache are consistent.

            batch        sequence      past                          total = past + sequence
prefill     1 … B        1 … S         0 … C - S (chunked prefill)   1 … C
decode      1 … B        1             1 … C - 1                     2 … C

B, S, C are ``max_batch``, ``max_seq`` and ``max_context``. A static cache always has C slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nbl_export.batch.names import BATCH, MAX, PAST, SEQUENCE, TOTAL
from nbl_export.errors import BuildError, InputError
from nbl_export.settings.choices import MAX_CONTEXT, MAX_SEQ

Shape = tuple[int, ...]
Range = tuple[int, int, int]
PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Profile:
    """One profile: each input's (minimum, optimum, maximum) shape."""

    name: str
    shapes: Mapping[str, tuple[Shape, Shape, Shape]]


@dataclass(frozen=True)
class Limits:
    """The maximum batch size, tokens per pass, and tokens of context of an engine."""

    max_batch: int
    max_seq: int
    max_context: int


def limits(max_batch: int, max_seq: int | None, max_context: int | None, model_context: int | None) -> Limits:
    """The requested limits; the defaults are 2,048 tokens of context and 512 per pass, or less if the model has less.

    ``model_context`` is the model's number of positions, None if unlimited. Raises :class:`InputError` for a limit
    beyond it, or for limits that contradict each other.
    """
    bound = model_context or 1 << 31
    context = min(MAX_CONTEXT, bound) if max_context is None else max_context
    sequence = min(MAX_SEQ, context) if max_seq is None else max_seq
    if context > bound:
        raise InputError(f"--max-context is {context:,}; the model has {bound:,} positions.")
    if sequence > context:
        raise InputError(f"--max-seq is {sequence:,}, more than --max-context ({context:,}).")
    for option, value, least in (("batch", max_batch, 1), ("seq", sequence, 1), ("context", context, 2)):
        if value < least:
            raise InputError(f"--max-{option} is {value}; it must be at least {least}.")
    return Limits(max_batch, sequence, context)


def profiles(inputs: Mapping[str, Sequence[int | str]], limits: Limits) -> tuple[Profile, Profile]:
    """The prefill and the decode profile for a graph's ``inputs``, shapes of integers and dimension names.

    Raises :class:`BuildError` for an unknown dimension name.
    """
    b, s, c = limits.max_batch, limits.max_seq, limits.max_context
    batch, buffer = (1, 1, b), (c, c, c)
    half = max(1, c // 2)
    tables: dict[str, dict[str, Range]] = {
        PREFILL: {SEQUENCE: (1, s, s), PAST: (0, 0, c - s), TOTAL: (1, s, c)},
        DECODE: {
            SEQUENCE: (1, 1, 1),
            PAST: (1, min(half, c - 1), c - 1),
            TOTAL: (2, min(half, c - 1) + 1, c),
        },
    }
    found = []
    for name, table in tables.items():
        # optimum writes the sum where others use a name.
        dims = {BATCH: batch, MAX: buffer, **table, f"{PAST} + {SEQUENCE}": table[TOTAL]}
        found.append(Profile(name, {i: _shapes(i, shape, dims) for i, shape in inputs.items()}))
    return found[0], found[1]


def _shapes(name: str, shape: Sequence[int | str], dims: Mapping[str, Range]) -> tuple[Shape, Shape, Shape]:
    for dim in shape:
        if not isinstance(dim, int) and dim not in dims:
            raise BuildError(
                f"The graph's input {name} has the dimension {dim!r}, for which no profile has a range."
            )
    low, opt, high = (
        tuple(dim if isinstance(dim, int) else dims[dim][which] for dim in shape) for which in range(3)
    )
    return low, opt, high
