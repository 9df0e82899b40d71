"""A linearized Llama as llama.cpp's architecture ``deci`` builds it, which knows linear attention.

A block of that architecture is an attention and an MLP, each behind its norm. Its attention may be a matrix alone
(heads, but none of keys and values) or nothing (no heads). The bias of such a matrix is not added, but that of an MLP
is: so a linear layer is a block of its own, whose MLP is zero but for its bias.

    layer i      attention(i), MLP(i)            W, b, MLP(i)
    blocks       [attention i, MLP i]            [W, zeros + b]  [nothing, MLP i]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nbl_export.blocks import Block, Mlp
from nbl_export.linearize.plan import Plan

ARCHITECTURE = "deci"
# The inner width of an MLP of zeros: as narrow as the blocks of quantized formats allow.
ZEROS = 32


@dataclass(frozen=True)
class DeciBlock:
    """One block: the layer whose ``attention`` it has, or the block that is ``linear`` in it, and the layer of its
    ``mlp``; where there is none, the MLP is zeros and the bias of ``linear``.
    """

    attention: int | None = None
    linear: Block | None = None
    mlp: int | None = None

    @property
    def has_heads(self) -> bool:
        """Whether it has an attention or a matrix in its place, if only of zeros where it has nothing at all."""
        return self.attention is not None or self.linear is not None or self.mlp is None


def blocks_of(plan: Plan) -> tuple[DeciBlock, ...]:
    """The blocks of the model with ``plan``, in order; the first has heads, as the architecture asks for."""
    found = [block for layer in range(plan.layer_count) for block in _of_layer(plan, layer)]
    if not found or not found[0].has_heads:
        found.insert(0, DeciBlock())
    return tuple(found)


def _of_layer(plan: Plan, layer: int) -> Iterator[DeciBlock]:
    chosen, mlp = set(plan.chosen), Mlp(layer)
    kept = None if mlp in chosen else layer
    if layer not in chosen:
        yield DeciBlock(attention=layer, mlp=kept)
    else:
        if layer in plan.layers:
            yield DeciBlock(linear=layer)
        if kept is not None:
            yield DeciBlock(mlp=layer)
    if mlp in plan.layers:
        yield DeciBlock(linear=mlp)
