"""Name what can become linear: the attention of a layer (7), its MLP (7.mlp), or a span of whole layers (7-9.span).

A block is what lies between two tensors: u, which it reads, and y, which it adds to the residual stream. A number
alone is an attention, so that plans, reports and settings of attention alone read as they always did.

A span is replaced by one affine map, W u + b, which stands where the attention of its first layer was; everything else
in it is dropped. So a plan, which says what becomes of every attention and MLP, has no spans (:func:`parts_in`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import total_ordering
from itertools import takewhile
from typing import Any

ATTENTION, MLP, SPAN = "attention", "mlp", "span"
PARTS = (ATTENTION, MLP)
# The most layers that one span has: so many spans begin with each layer, and each has moments of its own.
LONGEST_SPAN = 4
_SUFFIX, _SPAN_SUFFIX = f".{MLP}", f".{SPAN}"
_NUMBER = "(?:0|[1-9][0-9]*)"
_SPAN = re.compile(rf"({_NUMBER})(?:-({_NUMBER}))?\.{SPAN}", re.ASCII)
_WRITTEN = f"write 7 for an attention, 7{_SUFFIX} for an MLP, 7-9{_SPAN_SUFFIX} for a span of layers"


@total_ordering
class _Named:
    """A block that is not written as a number alone; blocks are in the order of layers, and in it of their parts.

    No dataclass, which would become a dictionary in a record.
    """

    __slots__ = ("last", "layer")

    def __init__(self, layer: int, last: int) -> None:
        self.layer, self.last = layer, last

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __hash__(self) -> int:
        return hash(_place(self))  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and _place(other) == _place(self)  # type: ignore[arg-type]

    def __lt__(self, other: Block) -> bool:
        return _place(self) < _place(other)  # type: ignore[arg-type]


class Mlp(_Named):
    """The MLP of layer ``layer``: it comes after the layer's attention and before the next layer."""

    __slots__ = ()

    def __init__(self, layer: int) -> None:
        super().__init__(layer, layer)

    def __str__(self) -> str:
        return f"{self.layer}{_SUFFIX}"


class Span(_Named):
    """The layers from ``layer`` to ``last``, as a whole; a span comes after the parts of its first layer."""

    __slots__ = ()

    def __init__(self, layer: int, last: int) -> None:
        super().__init__(layer, last)
        if last < layer:
            raise ValueError(f"a span of layers {layer} to {last} has none")

    @property
    def layers(self) -> range:
        return range(self.layer, self.last + 1)

    def __str__(self) -> str:
        return f"{self.layer}{f'-{self.last}' * (self.last > self.layer)}{_SPAN_SUFFIX}"


Block = int | Mlp | Span


def layer_of(block: Block) -> int:
    """The number of the layer that ``block`` is a part of, or begins with."""
    return block if isinstance(block, int) else block.layer


def part_of(block: Block) -> str:
    """``attention``, ``mlp`` or ``span``."""
    return {Span: SPAN, Mlp: MLP}.get(type(block), ATTENTION)


def _place(block: Block) -> tuple[int, int, int]:
    order = (ATTENTION, MLP, SPAN).index(part_of(block))
    return layer_of(block), order, block if isinstance(block, int) else block.last


def parts_in(block: Block) -> tuple[Block, ...]:
    """What becomes linear or is dropped with ``block``: the first one has W, the others of a span are dropped."""
    if not isinstance(block, Span):
        return (block,)
    return tuple(part for layer in block.layers for part in (layer, Mlp(layer)))


def all_parts(blocks: Iterable[Block]) -> tuple[Block, ...]:
    """The parts in all ``blocks``, ascending."""
    return tuple(sorted({part for block in blocks for part in parts_in(block)}))


def with_block(blocks: Iterable[Block], new: Block) -> tuple[Block, ...] | None:
    """``blocks`` and ``new``, which takes the place of those within it; None if it only has a part of one of them."""
    parts, kept = set(parts_in(new)), []
    for block in blocks:
        shared = parts & set(parts_in(block))
        if not shared:
            kept.append(block)
        elif len(shared) < len(parts_in(block)) or len(shared) == len(parts):
            return None
    return (*kept, new)


def spans_of(layers: Iterable[int]) -> list[Span]:
    """Every span of consecutive ``layers``, ascending."""
    every = set(layers)
    ends = ((first, range(first, first + LONGEST_SPAN)) for first in sorted(every))
    return [Span(first, last) for first, some in ends for last in takewhile(every.__contains__, some)]


def most_blocks(layers: int, parts: Collection[str]) -> list[Block]:
    """Every block of these ``parts`` that a model of so many ``layers`` can have, ascending."""
    every: dict[str, Iterable[Block]] = {
        ATTENTION: range(layers),
        MLP: map(Mlp, range(layers)),
        SPAN: spans_of(range(layers)),
    }
    return sorted(block for part in parts for block in every[part])


def grouped(linear: Iterable[Block], dropped: Collection[Block]) -> tuple[Block, ...]:
    """What was chosen, ascending: ``linear`` parts, as spans where the rest of some layers is ``dropped`` after them.

    Parts that are dropped without a map before them are blocks of their own.
    """
    found: list[Block] = []
    left = set(dropped)
    for part in sorted(linear):
        last = layer_of(part)
        if part_of(part) == ATTENTION and Mlp(last) in left:
            while last + 1 in left and Mlp(last + 1) in left:
                last += 1
            part = Span(layer_of(part), last)
            left -= {*parts_in(part)}
        found.append(part)
    return tuple(sorted([*found, *left]))


def block_of(text: str) -> Block:
    """The block that is written ``text``: 7, 7.mlp, 7.span or 7-9.span; raises ``ValueError`` for anything else."""
    if match := _SPAN.fullmatch(text):
        first, last = int(match[1]), int(match[2] or match[1])
        if match[2] and last <= first:
            raise ValueError(f"{text!r} ends before it begins: {_WRITTEN}")
        return Span(first, last)
    number = text.removesuffix(_SUFFIX)
    if not re.fullmatch(_NUMBER, number, re.ASCII):
        raise ValueError(f"{text!r} is no block: {_WRITTEN}")
    return int(number) if number == text else Mlp(int(number))


def as_json(block: Block) -> int | str:
    """An attention as a number, an MLP or a span as text."""
    return str(block) if isinstance(block, _Named) else block


def from_json(value: Any) -> Block:
    """What :func:`as_json` made; raises ``ValueError`` or ``TypeError`` for anything else."""
    if type(value) is int:
        return value
    if isinstance(value, str) and value.endswith((_SUFFIX, _SPAN_SUFFIX)):
        return block_of(value)
    raise TypeError(f"{value!r:.100} is no block")


def attentions(blocks: Iterable[Block]) -> tuple[int, ...]:
    """The attentions among ``blocks``, in their order."""
    return tuple(block for block in blocks if not isinstance(block, _Named))


def described(block: Block) -> str:
    """For a sentence: layer 7, the MLP of layer 7, or layers 7 to 9 as a whole."""
    if isinstance(block, Span):
        whole = (
            f"layers {block.layer} to {block.last}" if block.last > block.layer else f"layer {block.layer}"
        )
        return f"{whole} as a whole"
    return f"the MLP of layer {block.layer}" if isinstance(block, Mlp) else f"layer {block}"


def counted(blocks: Iterable[Block]) -> str:
    """For a sentence: 3 attention layers, 2 MLPs and 1 span of 2 layers."""
    every = tuple(blocks)
    spans = [block for block in every if isinstance(block, Span)]
    own = len(attentions(every))
    mlps = len(every) - own - len(spans)
    named = [f"{own} attention layer{'s' * (own != 1)}"] * bool(own or not (mlps or spans))
    named += [f"{mlps} MLP{'s' * (mlps != 1)}"] * bool(mlps)
    layers = sum(len(span.layers) for span in spans)
    of = f"{layers} layer{'s' * (layers != 1)}{' together' * (len(spans) > 1)}"
    named += [f"{len(spans)} span{'s' * (len(spans) != 1)} of {of}"] * bool(spans)
    return " and ".join([", ".join(named[:-1]), named[-1]] if named[1:] else named)
