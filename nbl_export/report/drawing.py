"""Build tables, and write numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from nbl_export.blocks import SPAN, Block, Mlp, Span, attentions


@dataclass(frozen=True)
class Table:
    """A title, column headings and rows of text; ``note`` explains what the columns mean.

    ``plot`` names the plot of the same figures, where there may be one; ``marked`` are the rows that were chosen;
    ``problems`` are sentences on what will not go well, each on a line of its own.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    plot: str = ""
    marked: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def number(value: Any, spec: str) -> str:
    """``value`` formatted; what is no finite number (nan, inf, also as text) stays itself."""
    return format(value, spec) if isinstance(value, (int, float)) and math.isfinite(value) else str(value)


def figure(value: Any) -> str:
    """1.2e-5: two digits, the exponent without its zero."""
    mantissa, e, exponent = number(value, ".1e").partition("e")
    return "0" if value == 0 else f"{mantissa}e{int(exponent)}" if e else mantissa


def milliseconds(value: float, like: float | None = None) -> str:
    """With the more decimals the shorter; with those of another time where it is ``like`` that."""
    own = value if like is None else like
    return number(value, ".1f" if own >= 10 else ".2f" if own >= 1 else ".3f")


def finite(value: Any) -> float | None:
    """``value`` if it is a number that can be drawn; a report writes nan and inf as text."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def worst(values: Iterable[float]) -> float:
    """The largest; what is no number is worse than any."""
    return max(values, key=lambda v: (v != v, v))


def listed(blocks: Sequence[Block]) -> str:
    """0, 7, 24-29: attentions by their layers, runs of three and more drawn together; then MLP 3, 12-14; span 8-9."""
    mlps = [block.layer for block in blocks if isinstance(block, Mlp)]
    spans = [str(block).removesuffix(f".{SPAN}") for block in sorted(blocks) if isinstance(block, Span)]
    parts = ("", _runs(attentions(blocks))), ("MLP ", _runs(mlps)), ("span ", ", ".join(spans))
    return "; ".join(name + part for name, part in parts if part)


def _runs(numbers: Sequence[int]) -> str:
    """A run are numbers that are as far from their places as the first of it."""
    placed = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    runs = [[n for _, n in run] for _, run in placed]
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)
