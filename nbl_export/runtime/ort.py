"""ONNX Runtime as a :class:`~nbl_export.runtime.stream.Stream`, for every form of the KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import (
    ALL_LOGITS,
    BOOL,
    F32,
    I64,
    MASK,
    NUM_LOGITS_TO_KEEP,
    POSITIONS,
    TOKENS,
    WRITE_INDICES,
    Inputs,
    prefix_mask,
    right_padded,
)
from nbl_export.errors import InputError
from nbl_export.graph.interface import interface_of
from nbl_export.graph.io import load_graph
from nbl_export.runtime.session import Provider, run_session, session
from nbl_export.runtime.stream import KV, DecoderOutput, PastStream, Stream, UncachedStream

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass
class Watch:
    """Outputs of a graph beside its own, by ``names``, and what they were in each run."""

    names: tuple[str, ...]
    passes: list[list[NDArray[Any]]] = field(default_factory=list)


class OrtModel:
    """A graph in a session, with its :class:`~nbl_export.graph.interface.Interface`; ``watch`` is told of each run.

    As a function it is a :class:`~nbl_export.runtime.stream.Decoder`; :meth:`encode` runs an encoder graph.
    """

    def __init__(
        self,
        path: Path,
        config: Mapping[str, str] | None = None,
        provider: Provider | None = None,
        rounded: bool = True,
        small: bool = False,
        watch: Watch | None = None,
    ) -> None:
        model = load_graph(path)
        self.interface = interface_of(model)
        self.kv_layers: tuple[int, ...] = self.interface.layers
        self.session = session(path, config, provider, rounded, model, small)
        self.past_names = self.interface.past_names
        self.output_names = [self.interface.logits, *self.interface.present_names]
        self.watch = watch or Watch(())

    @property
    def cache_dtype(self) -> np.dtype[Any]:
        """The dtype of keys and values; float32 for a graph without a cache."""
        kinds = {i.name: i.type for i in self.session.get_inputs()}
        kind = kinds[self.past_names[0]] if self.past_names else "tensor(float)"
        if kind not in _NUMPY:
            raise InputError(
                f"NumPy has no {kind} for a KV cache: run this graph on the CPU provider, or run its engine."
            )
        return np.dtype(_NUMPY[kind])

    def empty_past(self, batch: int, length: int = 0) -> list[KV]:
        """Keys and values of every cached layer, zeros with ``length`` slots, and states of zeros."""
        empty = self.interface.empty_cache(batch, length, self.cache_dtype)
        return list(self.interface.entries(list(empty.values())))

    def __call__(
        self, input_ids: I64, attention_mask: I64, position_ids: I64, past: Sequence[KV], num_logits: int = 0
    ) -> DecoderOutput:
        inputs = {TOKENS: input_ids, MASK: attention_mask, POSITIONS: position_ids}
        return self.step(inputs, past, num_logits)

    def step(
        self, inputs: Mapping[str, I64], past: Sequence[KV], num_logits: int = ALL_LOGITS
    ) -> DecoderOutput:
        """Logits and the extended cache; of the ``inputs`` by name those are left out that the graph does not have."""
        feeds: dict[str, Any] = dict(zip(self.past_names, [a for entry in past for a in entry], strict=True))
        feeds |= self.interface.named(inputs)
        if NUM_LOGITS_TO_KEEP in feeds:
            feeds[NUM_LOGITS_TO_KEEP] = np.array(num_logits, dtype=np.int64)
        own = len(self.output_names)
        found = run_session(self.session, [*self.output_names, *self.watch.names], feeds)
        if self.watch.names:
            self.watch.passes.append(found[own:])
        return DecoderOutput(np.asarray(found[0]), self.interface.entries(found[1:own]))

    def encode(self, inputs: Inputs) -> dict[str, F32]:
        """The outputs of an encoder graph, by name, for a batch by input name."""
        names = self.interface.outputs
        found = run_session(self.session, names, self.interface.named(inputs))
        return {name: np.asarray(a, dtype=np.float32) for name, a in zip(names, found, strict=True)}


class OrtRowsStream(Stream):
    """A decoder graph that knows how long each row is, as a stream: rows are padded on the right.

    Its cache is static, of ``capacity`` slots, and the graph is told where to write; or it grows, as with
    GroupQueryAttention, and the next token of a row overwrites its padding.
    """

    kv_layers: tuple[int, ...]
    extends = True

    def __init__(self, model: OrtModel, capacity: int) -> None:
        self.model, self.kv_layers = model, model.kv_layers
        self.static, self.capacity = model.interface.static, capacity
        self._past: Sequence[KV] = ()
        self._lengths = np.zeros(0, dtype=np.int64)
        self._slots = 0

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        logits = self._begin(rows)
        return logits[prefix_mask(self._lengths, logits.shape[1])]

    def prefill_last(self, rows: Sequence[NDArray[Any]]) -> F32:
        lengths = [len(row) for row in rows]
        logits = self._begin(rows, num_logits=max(lengths) - min(lengths) + 1)
        return logits[np.arange(len(rows)), self._lengths - max(lengths) - 1]

    def _begin(self, rows: Sequence[NDArray[Any]], num_logits: int = ALL_LOGITS) -> F32:
        ids, positions = right_padded(rows)
        start = np.zeros(len(rows), dtype=np.int64)
        self._past = self.model.empty_past(len(rows), self.capacity if self.static else 0)
        self._slots = 0
        return self._run(ids, positions, start, np.array([len(row) for row in rows]), num_logits)

    def decode(self, tokens: Sequence[int]) -> F32:
        start, ids = self._lengths, np.array(tokens, dtype=np.int64)[:, None]
        return self._run(ids, start[:, None], start, np.ones_like(start))[:, 0]

    def extend(self, owners: Sequence[int], rows: Sequence[NDArray[Any]]) -> F32:
        if len(rows) > 1 and not self.static:
            # onnxruntime's operator can append several tokens only at batch size 1: the batch stays what it is.
            each = zip(owners, rows, strict=True)
            return np.concatenate([self.fork().extend([owner], [row]) for owner, row in each])
        picked, lengths = np.asarray(owners), np.array([len(row) for row in rows])
        start, (ids, offsets) = self._lengths[picked], right_padded(rows)
        if not self.static:
            self._slots = int(start[0])  # without the padding of keys and values
        self._past = [
            tuple(
                side[picked, :, : self._slots] if n < len(self.kv_layers) else side[picked] for side in entry
            )
            for n, entry in enumerate(self._past)
        ]
        return self._run(ids, start[:, None] + offsets, start, lengths)[prefix_mask(lengths, ids.shape[1])]

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        return self._past, prefix_mask(self._lengths, self._slots)

    def reserve(self, tokens: int) -> None:
        # The cache is allocated for each prefill; the current batch needs no more slots than its rows.
        self.capacity = tokens

    def _run(self, ids: I64, positions: I64, start: I64, lengths: I64, num_logits: int = ALL_LOGITS) -> F32:
        """Logits [rows, tokens, vocab] of rows of these ``lengths``, padded to ``ids``, after ``start`` tokens."""
        self._lengths, self._slots = start + lengths, self._slots + ids.shape[1]
        inputs = {TOKENS: ids, POSITIONS: positions}
        if self.static:
            tokens, self._slots = int(start.max()) + ids.shape[1], self.capacity
            if tokens > self.capacity:
                raise InputError(
                    f"{tokens} tokens do not fit into a static cache of {self.capacity} slots: use shorter rows."
                )
            inputs[WRITE_INDICES] = start
        else:
            inputs[MASK] = prefix_mask(self._lengths, self._slots).astype(np.int64)
        output = self.model.step(inputs, self._past, num_logits)
        self._past = output.present
        return output.logits


def ort_stream(
    path: Path, capacity: int, rounded: bool = True, small: bool = False, watch: Watch | None = None
) -> Stream:
    """The decoder graph at ``path`` as a stream of up to ``capacity`` tokens a row; ``watch`` is told of each run.

    ``rounded`` and ``small``: see :func:`~nbl_export.runtime.session.session`.
    """
    model = OrtModel(path, rounded=rounded, small=small, watch=watch)
    if model.interface.static or model.interface.ragged:
        return OrtRowsStream(model, capacity)
    if model.interface.cacheless:
        return UncachedStream(lambda ids, mask, positions: model(ids, mask, positions, ()).logits)
    return PastStream(model)
