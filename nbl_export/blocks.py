"""What can become linear: the attention of a layer, written as the layer's number (7), or its MLP (7.mlp).

A block is what lies between two tensors: u, which it reads, and y, which it adds to the residual stream. A number
alone is an attention, so that plans, reports and settings of attention alone read as they always did.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import total_ordering
from typing import Any

ATTENTION, MLP = "attention", "mlp"
PARTS = (ATTENTION, MLP)
_SUFFIX = f".{MLP}"


@total_ordering
class Mlp:
    """The MLP of layer ``layer``: it comes after the layer's attention and before the next layer."""

    __slots__ = ("layer",)

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __str__(self) -> str:
        return f"{self.layer}{_SUFFIX}"

    def __repr__(self) -> str:
        return f"Mlp({self.layer})"

    def __hash__(self) -> int:
        return hash((self.layer, MLP))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mlp) and other.layer == self.layer

    def __lt__(self, other: Block) -> bool:
        return self.layer < layer_of(other)


Block = int | Mlp


def layer_of(block: Block) -> int:
    """The number of the layer that ``block`` is a part of."""
    return block.layer if isinstance(block, Mlp) else block


def part_of(block: Block) -> str:
    """``attention`` or ``mlp``."""
    return MLP if isinstance(block, Mlp) else ATTENTION


def block_of(text: str) -> Block:
    """The block that is written ``text``: 7 or 7.mlp; raises ``ValueError`` for anything else."""
    number = text.removesuffix(_SUFFIX)
    if not (number.isascii() and number.isdecimal()) or (len(number) > 1 and number[0] == "0"):
        raise ValueError(f"{text!r} is no block: write 7 for an attention, 7{_SUFFIX} for an MLP")
    return Mlp(int(number)) if text.endswith(_SUFFIX) else int(number)


def as_json(block: Block) -> int | str:
    """An attention as a number, an MLP as text."""
    return str(block) if isinstance(block, Mlp) else block


def from_json(value: Any) -> Block:
    """What :func:`as_json` made; raises ``ValueError`` or ``TypeError`` for anything else."""
    if type(value) is int:
        return value
    if isinstance(value, str) and value.endswith(_SUFFIX):
        return block_of(value)
    raise TypeError(f"{value!r:.100} is no block")


def attentions(blocks: Iterable[Block]) -> tuple[int, ...]:
    """The attentions among ``blocks``, in their order."""
    return tuple(block for block in blocks if not isinstance(block, Mlp))


def described(block: Block) -> str:
    """For a sentence: layer 7, or the MLP of layer 7."""
    return f"the MLP of layer {block.layer}" if isinstance(block, Mlp) else f"layer {block}"


def counted(blocks: Iterable[Block]) -> str:
    """For a sentence: 3 attention layers and 2 MLPs."""
    every = tuple(blocks)
    own = len(attentions(every))
    mlps = len(every) - own
    named = [f"{own} attention layer{'s' * (own != 1)}"] if own or not mlps else []
    named += [f"{mlps} MLP{'s' * (mlps != 1)}"] if mlps else []
    return " and ".join(named)
