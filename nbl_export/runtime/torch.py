"""Run PyTorch as a :class:`~nbl_export.runtime.stream.Decoder` or encoder: the reference for every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.batch.arrays import F32, I64
from nbl_export.batch.rows import Inputs
from nbl_export.models.dummy_run import cache_shapes, dummy_run
from nbl_export.models.forward import run_uncached, run_with_past
from nbl_export.models.weights import device_of, weights_like
from nbl_export.runtime.stream import KV, DecoderOutput, PastStream, Stream, UncachedStream

if TYPE_CHECKING:
    import torch

    from nbl_export.models.caches import Entry
    from nbl_export.models.forward import Encoder


class TorchDecoder:
    """A causal language model of transformers, original or linearized, with an explicit cache.

    ``linearized`` are the layers without a cache; they have no cache entries.
    """

    def __init__(self, model: torch.nn.Module, linearized: Sequence[int] = ()) -> None:
        self.model = model
        self._blocks = dummy_run(model).cache
        self.kv_layers = tuple(i for i in cache_shapes(model) if i not in set(linearized))

    def empty_past(self, batch: int) -> list[Entry]:
        like = weights_like(self.model)
        return self._kept([block.empty(like, batch) for block in self._blocks])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Any,
        num_logits: int = 0,
    ) -> tuple[torch.Tensor, list[Entry]]:
        """Tensors in, tensors out; ``past`` has the pair of each of ``kv_layers``, then every state by itself."""
        length = attention_mask.shape[1] - input_ids.shape[1]
        every = self._spread(past, input_ids.shape[0])
        logits, present = run_with_past(
            self.model, input_ids, attention_mask, position_ids, every, length, num_logits
        )
        return logits, self._kept(present)

    def _kept(self, entries: Sequence[Entry]) -> list[Entry]:
        states = (
            state
            for block, entry in zip(self._blocks, entries, strict=True)
            for state in block.parts(entry)[1]
        )
        return [*(entries[i][:2] for i in self.kv_layers), *((state,) for state in states)]

    def _spread(self, past: Any, batch: int) -> list[Entry]:
        # transformers indexes the cache by layer: linearized layers get an empty entry.
        import torch

        empty = torch.zeros(batch, 1, 0, 1, device=device_of(self.model))
        pairs = dict(zip(self.kv_layers, past, strict=False))
        states = iter(past[len(pairs) :])
        return [
            (
                *(pairs.get(index, (empty, empty)) if block.kv else ()),
                *(next(states)[0] for _ in block.states),
            )
            for index, block in enumerate(self._blocks)
        ]

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
            tuple(tuple(t.float().cpu().numpy() for t in entry) for entry in present),
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


class TorchEncoder:
    """The PyTorch model of ``encoder``, in its state at the time of the call."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, inputs: Inputs) -> dict[str, F32]:
        import torch

        like = weights_like(self.encoder.model)
        given = [
            torch.from_numpy(np.ascontiguousarray(inputs[n])).to(like.device) for n in self.encoder.inputs
        ]
        given = [t.to(like.dtype) if t.is_floating_point() else t for t in given]
        with torch.inference_mode():
            found = self.encoder(*given)
        return {n: t.float().cpu().numpy() for n, t in zip(self.encoder.outputs, found, strict=True)}
