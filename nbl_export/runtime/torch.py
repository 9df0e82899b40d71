"""PyTorch as a :class:`~nbl_export.runtime.decoder.Decoder`: the reference for every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nbl_export.batch.arrays import F32, I64
from nbl_export.models.dummy_run import cache_shapes
from nbl_export.models.forward import run_uncached, run_with_past
from nbl_export.models.weights import weights_like
from nbl_export.runtime.decoder import KV, DecoderOutput
from nbl_export.runtime.stream import PastStream, Stream, UncachedStream

if TYPE_CHECKING:
    import torch


class TorchDecoder:
    """A causal language model of transformers, original or linearized, with an explicit cache.

    ``linearized`` are the layers without a cache; they have no cache entries.
    """

    def __init__(self, model: torch.nn.Module, linearized: Sequence[int] = ()) -> None:
        self.model = model
        self._kv_layers = tuple(i for i in cache_shapes(model) if i not in set(linearized))

    @property
    def kv_layers(self) -> tuple[int, ...]:
        return self._kv_layers

    def empty_past(self, batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        like = weights_like(self.model)
        shapes = cache_shapes(self.model)
        return [
            (like.new_zeros(batch, s.heads, 0, s.key_size), like.new_zeros(batch, s.heads, 0, s.value_size))
            for s in (shapes[i] for i in self._kv_layers)
        ]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Any,
        num_logits: int = 0,
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Tensors in, tensors out; ``past`` has one entry for each of ``kv_layers``."""
        length = attention_mask.shape[1] - input_ids.shape[1]
        by_layer = dict(zip(self._kv_layers, past, strict=True))
        return run_with_past(
            self.model, input_ids, attention_mask, position_ids, by_layer, length, num_logits
        )

    def __call__(
        self, input_ids: I64, attention_mask: I64, position_ids: I64, past: Sequence[KV], num_logits: int = 0
    ) -> DecoderOutput:
        import torch

        like = weights_like(self.model)
        ids, mask, positions = (
            torch.from_numpy(a).to(like.device) for a in (input_ids, attention_mask, position_ids)
        )
        tensors = [
            tuple(t if isinstance(t, torch.Tensor) else torch.from_numpy(t).to(like) for t in pair)
            for pair in past
        ]
        with torch.inference_mode():
            logits, present = self.forward(ids, mask, positions, tensors, num_logits)
        return DecoderOutput(
            logits.float().cpu().numpy(),
            tuple((k.float().cpu().numpy(), v.float().cpu().numpy()) for k, v in present),
        )


def torch_stream(model: torch.nn.Module, linearized: Sequence[int] = (), cached: bool = True) -> Stream:
    """The ``model``, original or with the layers ``linearized``, as a stream with or without a KV cache."""
    if cached:
        return PastStream(TorchDecoder(model, linearized))
    return UncachedStream(lambda *inputs: uncached_logits(model, *inputs))


def uncached_logits(model: torch.nn.Module, input_ids: I64, attention_mask: I64, position_ids: I64) -> F32:
    """Logits [batch, sequence, vocab] of one forward pass without a cache."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
    logits: F32 = run_uncached(model, inputs).logits.float().cpu().numpy()
    return logits
