"""ONNX Runtime as a :class:`~nbl_export.runtime.stream.Stream`, for every form of the KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, F32, I64
from nbl_export.batch.names import ALL_LOGITS, MASK, NUM_LOGITS_TO_KEEP, POSITIONS, TOKENS, WRITE_INDICES
from nbl_export.batch.rows import Inputs, prefix_mask, right_padded
from nbl_export.errors import InputError
from nbl_export.graph.interface import interface_of
from nbl_export.graph.io import load_graph
from nbl_export.runtime.session import Provider, require_onnxruntime, run_session, running_provider, session
from nbl_export.runtime.stream import KV, DecoderOutput, PastStream, Stream, UncachedStream

_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass
class Watch:
    """Outputs of a graph beside its own, by ``names``, and what they were in each run."""

    names: tuple[str, ...]
    passes: list[list[NDArray[Any]]] = field(default_factory=list)


class OrtModel:
    """A graph in a session, with its :class:`~nbl_export.graph.interface.Interface`; ``watch`` is told of each run."""

    def __init__(
        self,
        path: Path,
        config: Mapping[str, str] | None = None,
        provider: Provider | None = None,
        rounded: bool = True,
        small: bool = False,
        watch: Watch | None = None,
    ) -> None:
        require_onnxruntime()
        provider = running_provider() if provider is None else provider
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

    def buffers(self, batch: int, length: int) -> list[KV]:
        """Keys and values of every cached layer, zeros with ``length`` slots, and states of zeros."""
        return list(
            self.interface.entries(list(self.interface.empty_cache(batch, length, self.cache_dtype).values()))
        )

    def named(self, inputs: Mapping[str, I64], past: Sequence[KV]) -> dict[str, Any]:
        """The session's inputs by name; inputs that the graph does not have are left out."""
        feeds: dict[str, Any] = dict(zip(self.past_names, [a for entry in past for a in entry], strict=True))
        return feeds | self.interface.named(inputs)

    def run(self, feeds: Mapping[str, Any]) -> DecoderOutput:
        """Logits and the extended cache for the session's inputs ``feeds``."""
        names = [*self.output_names, *self.watch.names]
        logits, *present = run_session(self.session, names, feeds)
        if self.watch.names:
            own = len(self.output_names) - 1
            present, seen = present[:own], present[own:]
            self.watch.passes.append(seen)
        return DecoderOutput(np.asarray(logits), self.interface.entries(present))


class OrtDecoder(OrtModel):
    """A decoder graph with a growing cache, passed in and out as arrays."""

    def empty_past(self, batch: int) -> list[KV]:
        return self.buffers(batch, 0)

    def feeds(self, ids: I64, mask: I64, positions: I64, past: Sequence[KV]) -> dict[str, Any]:
        """The session's inputs by name."""
        return self.named({TOKENS: ids, MASK: mask, POSITIONS: positions}, past)

    def __call__(
        self,
        input_ids: I64,
        attention_mask: I64,
        position_ids: I64,
        past: Sequence[KV],
        num_logits: int = ALL_LOGITS,
    ) -> DecoderOutput:
        feeds = self.feeds(input_ids, attention_mask, position_ids, past)
        if NUM_LOGITS_TO_KEEP in feeds:
            feeds[NUM_LOGITS_TO_KEEP] = np.array(num_logits, dtype=np.int64)
        return self.run(feeds)


class OrtEncoder(OrtModel):
    """An encoder graph: from a batch by input name to its outputs by name."""

    def __call__(self, inputs: Inputs) -> dict[str, F32]:
        names = self.interface.outputs
        found = run_session(self.session, names, self.interface.named(inputs))
        return {name: np.asarray(a, dtype=np.float32) for name, a in zip(names, found, strict=True)}


class OrtRaggedStream(Stream):
    """A decoder graph that takes the length of each row, such as one with GroupQueryAttention, as a stream.

    Rows are padded on the right, and the next token of a row overwrites its padding in the cache.
    """

    extends = True

    def __init__(
        self, path: Path, rounded: bool = True, small: bool = False, watch: Watch | None = None
    ) -> None:
        self.decoder = OrtDecoder(path, rounded=rounded, small=small, watch=watch)
        self.kv_layers = self.decoder.kv_layers
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

    def decode(self, tokens: Sequence[int]) -> F32:
        positions, self._lengths = self._lengths[:, None], self._lengths + 1
        return self._run(np.array(tokens, dtype=np.int64)[:, None], positions)[:, 0]

    def extend(self, owners: Sequence[int], rows: Sequence[NDArray[Any]]) -> F32:
        # Row by row: onnxruntime's operator can append several tokens only at batch size 1.
        starts = self._lengths[np.asarray(owners)]
        found = [
            self._one(owner, int(start), row) for owner, start, row in zip(owners, starts, rows, strict=True)
        ]
        self._lengths = starts + np.array([len(row) for row in rows])
        self._slots = int(np.max(self._lengths))
        self._past = [
            tuple(
                self._stacked(side, grows=place < len(self.decoder.kv_layers))
                for side in zip(*rows, strict=True)
            )
            for place, rows in enumerate(zip(*(output.present for output in found), strict=True))
        ]
        return np.concatenate([output.logits[0] for output in found])

    def _one(self, owner: int, start: int, row: NDArray[Any]) -> DecoderOutput:
        own = slice(owner, owner + 1)
        kv = len(self.decoder.kv_layers)
        past: list[KV] = [(key[own, :, :start], value[own, :, :start]) for key, value in self._past[:kv]]
        past += [(state[own],) for (state,) in self._past[kv:]]
        ids, mask = row[None].astype(np.int64), np.ones((1, start + len(row)), dtype=np.int64)
        return self.decoder(ids, mask, start + np.arange(len(row))[None], past)

    def _stacked(self, arrays: Sequence[F32], grows: bool) -> F32:
        if not grows:
            return np.concatenate(arrays)
        _, heads, _, size = arrays[0].shape
        stacked = np.zeros((len(arrays), heads, self._slots, size), dtype=arrays[0].dtype)
        for i, array in enumerate(arrays):
            stacked[i, :, : array.shape[2]] = array[0]
        return stacked

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        return self._past, prefix_mask(self._lengths, self._slots)

    def _begin(self, rows: Sequence[NDArray[Any]], num_logits: int = ALL_LOGITS) -> F32:
        self._lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self._past, self._slots = self.decoder.empty_past(len(rows)), 0
        return self._run(*right_padded(rows), num_logits)

    def _run(self, ids: I64, positions: I64, num_logits: int = ALL_LOGITS) -> F32:
        self._slots += ids.shape[1]
        mask = prefix_mask(self._lengths, self._slots).astype(np.int64)
        output = self.decoder(ids, mask, positions, self._past, num_logits)
        self._past = output.present
        return output.logits


class OrtStaticStream(OrtModel, Stream):
    """A decoder graph with a static cache of ``capacity`` slots, as a stream."""

    kv_layers: tuple[int, ...]
    extends = True

    def __init__(
        self,
        path: Path,
        capacity: int,
        rounded: bool = True,
        small: bool = False,
        watch: Watch | None = None,
    ) -> None:
        super().__init__(path, rounded=rounded, small=small, watch=watch)
        self.capacity = capacity
        self._past: Sequence[KV] = ()
        self._lengths = np.zeros(0, dtype=np.int64)

    def prefill_feeds(self, rows: Sequence[NDArray[Any]]) -> dict[str, Any]:
        """The session's inputs for ``rows`` and an empty cache."""
        ids, positions = right_padded(rows)
        start = np.zeros(len(rows), dtype=np.int64)
        inputs = {TOKENS: ids, POSITIONS: positions, WRITE_INDICES: start}
        return self.named(inputs, self.buffers(len(rows), self.capacity))

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._lengths = np.array([len(row) for row in rows], dtype=np.int64)
        longest = int(np.max(self._lengths))
        self._check_capacity(longest)
        return self._run(self.prefill_feeds(rows))[prefix_mask(self._lengths, longest)]

    def decode(self, tokens: Sequence[int]) -> F32:
        self._check_capacity(int(np.max(self._lengths)) + 1)
        inputs = {
            TOKENS: np.array(tokens, dtype=np.int64)[:, None],
            POSITIONS: self._lengths[:, None],
            WRITE_INDICES: self._lengths,
        }
        logits = self._run(self.named(inputs, self._past))
        self._lengths = self._lengths + 1
        return logits[:, 0]

    def extend(self, owners: Sequence[int], rows: Sequence[NDArray[Any]]) -> F32:
        picked = np.asarray(owners)
        start, lengths = self._lengths[picked], np.array([len(row) for row in rows], dtype=np.int64)
        ids, offsets = right_padded(rows)
        self._check_capacity(int(start.max()) + ids.shape[1])
        inputs = {TOKENS: ids, POSITIONS: start[:, None] + offsets, WRITE_INDICES: start}
        past = [tuple(side[picked] for side in entry) for entry in self._past]
        logits = self._run(self.named(inputs, past))
        self._lengths = start + lengths
        return logits[prefix_mask(lengths, ids.shape[1])]

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        return self._past, prefix_mask(self._lengths, self.capacity)

    def reserve(self, tokens: int) -> None:
        # The cache is allocated for each prefill; the current batch needs no more slots than its rows.
        self.capacity = tokens

    def _check_capacity(self, tokens: int) -> None:
        if tokens > self.capacity:
            raise InputError(
                f"{tokens} tokens do not fit into a static cache of {self.capacity} slots: use shorter rows."
            )

    def _run(self, feeds: Mapping[str, Any]) -> F32:
        output = self.run(feeds)
        self._past = output.present
        return output.logits


def ort_stream(
    path: Path, capacity: int, rounded: bool = True, small: bool = False, watch: Watch | None = None
) -> Stream:
    """The decoder graph at ``path`` as a stream of up to ``capacity`` tokens a row; ``watch`` is told of each run.

    ``rounded`` and ``small``: see :func:`~nbl_export.runtime.session.session`.
    """
    interface = interface_of(load_graph(path))
    if interface.static:
        return OrtStaticStream(path, capacity, rounded, small, watch)
    if interface.ragged:
        return OrtRaggedStream(path, rounded, small, watch)
    decoder = OrtDecoder(path, rounded=rounded, small=small, watch=watch)
    if interface.cacheless:
        return UncachedStream(lambda ids, mask, positions: decoder(ids, mask, positions, ()).logits)
    return PastStream(decoder)
