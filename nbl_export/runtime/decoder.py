"""What every runtime looks like to the rest: one function from tokens and cache to logits and cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nbl_export.batch.arrays import F32, I64

KV = tuple[F32, F32]


@dataclass(frozen=True)
class DecoderOutput:
    """``logits`` [batch, sequence, vocab] and, per cached layer, keys and values [batch, heads, total, head_dim]."""

    logits: F32
    present: tuple[KV, ...]


class Decoder(Protocol):
    """A decoder with an explicit KV cache.

    ``kv_layers`` says which layer of the model each cache entry belongs to, in cache order.
    """

    @property
    def kv_layers(self) -> tuple[int, ...]: ...

    def empty_past(self, batch: int) -> Any:
        """The cache before the first token."""

    def __call__(
        self, input_ids: I64, attention_mask: I64, position_ids: I64, past: Sequence[KV], keep: int = 0
    ) -> DecoderOutput:
        """Run ``input_ids`` [batch, sequence] after ``past``; the mask covers past and sequence.

        Logits of the ``keep`` last positions are asked for, 0 for all; where the decoder can make no fewer, there
        may be more.
        """
