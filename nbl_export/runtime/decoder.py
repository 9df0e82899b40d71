"""The decoder interface of every runtime: a function from tokens and KV cache to logits and KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nbl_export.batch.arrays import F32, I64

# Keys and values of a layer, or one state of a layer that is not softmax attention.
KV = tuple[F32, ...]


@dataclass(frozen=True)
class DecoderOutput:
    """``logits`` [batch, sequence, vocab] and the cache: per cached layer keys and values [batch, heads, total,
    head_dim], then each state [batch, …] of layers that keep some.
    """

    logits: F32
    present: tuple[KV, ...]


class Decoder(Protocol):
    """A decoder with an explicit KV cache.

    ``kv_layers`` are the model's layer indices of the first cache entries, keys and values, in cache order; states
    follow.
    """

    @property
    def kv_layers(self) -> tuple[int, ...]: ...

    def empty_past(self, batch: int) -> Any:
        """An empty cache."""

    def __call__(
        self, input_ids: I64, attention_mask: I64, position_ids: I64, past: Sequence[KV], num_logits: int = 0
    ) -> DecoderOutput:
        """Run ``input_ids`` [batch, sequence] after ``past``; the mask covers past and sequence.

        Returns logits of the last ``num_logits`` positions, 0 for all. A decoder without this option returns all.
        """
