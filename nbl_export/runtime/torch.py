"""Run PyTorch: the reference decoder and encoder of every comparison, and folders that transformers loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache

from nbl_export.batch import F32, I64, Inputs
from nbl_export.errors import BuildError, first_line
from nbl_export.models.dummy_run import Entry, cache_shapes, dummy_run
from nbl_export.models.forward import Encoder, run_uncached, run_with_past
from nbl_export.models.modeling_nbl import register
from nbl_export.models.running import cache_argument, quiet
from nbl_export.models.weights import weights_like
from nbl_export.runtime.stream import DecoderOutput, PastStream, RowStream, Stream, UncachedStream


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

    def _kept(self, entries: Sequence[Entry]) -> list[Entry]:
        """The pair of each of ``kv_layers``, then every state by itself."""
        states = [
            state
            for block, entry in zip(self._blocks, entries, strict=True)
            for state in block.parts(entry)[1]
        ]
        return [*(entries[i][:2] for i in self.kv_layers), *((state,) for state in states)]

    def _spread(self, past: Sequence[Entry], empty: torch.Tensor) -> list[Entry]:
        """The same by layer, as transformers indexes its cache: linearized layers get an ``empty`` entry."""
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
        self, input_ids: I64, attention_mask: I64, position_ids: I64, past: Sequence[Any], num_logits: int = 0
    ) -> DecoderOutput:
        like, length = weights_like(self.model), attention_mask.shape[1] - input_ids.shape[1]
        arrays = (input_ids, attention_mask, position_ids)
        ids, mask, positions = (torch.from_numpy(array).to(like.device) for array in arrays)
        entries: list[Entry] = [
            tuple(t if isinstance(t, torch.Tensor) else torch.from_numpy(t).to(like) for t in entry)
            for entry in past
        ]
        empty = torch.zeros(len(input_ids), 1, 0, 1, device=like.device)
        with torch.inference_mode():
            every = self._spread(entries, empty)
            logits, present = run_with_past(self.model, ids, mask, positions, every, length, num_logits)
        kept = tuple(tuple(t.float().cpu().numpy() for t in entry) for entry in self._kept(present))
        return DecoderOutput(logits.float().cpu().numpy(), kept)


def torch_stream(model: torch.nn.Module, linearized: Sequence[int] = (), cached: bool = True) -> Stream:
    """The ``model``, original or with the layers ``linearized``, as a stream with or without a KV cache."""
    if cached:
        return PastStream(TorchDecoder(model, linearized))

    def logits(input_ids: I64, attention_mask: I64, position_ids: I64) -> F32:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        found: F32 = run_uncached(model, inputs).logits.float().cpu().numpy()
        return found

    return UncachedStream(logits)


class TorchEncoder:
    """The PyTorch model of ``encoder``, in its state at the time of the call."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, inputs: Inputs) -> dict[str, F32]:
        like = weights_like(self.encoder.model)
        given = [
            torch.from_numpy(np.ascontiguousarray(inputs[n])).to(like.device) for n in self.encoder.inputs
        ]
        given = [t.to(like.dtype) if t.is_floating_point() else t for t in given]
        with torch.inference_mode():
            found = self.encoder(*given)
        return {n: t.float().cpu().numpy() for n, t in zip(self.encoder.outputs, found, strict=True)}


class TransformersStream(RowStream):
    """The folder at ``path``, loaded as a user does, by classes that :mod:`nbl_export.transformers` registers.

    Each row has transformers' own cache, as it has in `generate`. Raises :class:`BuildError` for a folder that
    transformers does not load whole.
    """

    def __init__(self, path: Path) -> None:
        register()
        try:
            with quiet():
                model, found = AutoModelForCausalLM.from_pretrained(
                    path, local_files_only=True, output_loading_info=True, dtype="auto"
                )
        except Exception as error:  # its own code may raise anything
            raise BuildError(f"transformers does not load {path}: {first_line(error)[:300]}.") from error
        if odd := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
            raise BuildError(f"transformers does not find every weight of {path}: {odd[0]}.")
        self.model: Any = model.eval()
        nbl = self.model.config.nbl
        linear = {name.split(".")[-2] for name in nbl["modules"] if name.endswith(f".{nbl['attention']}")}
        layers = range(self.model.config.num_hidden_layers)
        self.kv_layers = tuple(i for i in layers if str(i) not in linear)

    def _empty(self) -> Any:
        # Without a configuration it keeps what is behind a window, too: every key and value can be compared.
        return DynamicCache()

    def _logits(self, tokens: NDArray[Any], cache: Any) -> F32:
        ids = torch.tensor(tokens.astype(np.int64))[None]
        with torch.inference_mode():
            given = {cache_argument(self.model): cache}
            logits = self.model(input_ids=ids, use_cache=True, **given).logits[0]
        found: F32 = logits.float().numpy()
        return found

    def _sides(self, cache: Any) -> list[tuple[F32, F32]]:
        kept = [layer for layer in cache.layers if layer.get_seq_length()]
        return [(layer.keys.float().numpy(), layer.values.float().numpy()) for layer in kept]
