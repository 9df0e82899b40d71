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

    def empty_past(self, batch: int, length: int = 0) -> list[KV]:
        """Keys and values of every cached layer, zeros with ``length`` slots, and states of zeros."""
        empty = self.interface.empty_cache(batch, length, self.cache_dtype)
        return list(self.interface.entries(list(empty.values())))

    def feeds(
        self, inputs: Mapping[str, I64], past: Sequence[KV], num_logits: int = ALL_LOGITS
    ) -> dict[str, Any]:
        """The session's inputs by name; inputs that the graph does not have are left out."""
        feeds: dict[str, Any] = dict(zip(self.past_names, [a for entry in past for a in entry], strict=True))
        feeds |= self.interface.named(inputs)
        if NUM_LOGITS_TO_KEEP in feeds:
            feeds[NUM_LOGITS_TO_KEEP] = np.array(num_logits, dtype=np.int64)
        return feeds

    def run(self, feeds: Mapping[str, Any]) -> DecoderOutput:
        """Logits and the extended cache for the session's inputs ``feeds``."""
        own = len(self.output_names)
        found = run_session(self.session, [*self.output_names, *self.watch.names], feeds)
        if self.watch.names:
            self.watch.passes.append(found[own:])
        return DecoderOutput(np.asarray(found[0]), self.interface.entries(found[1:own]))


class OrtDecoder(OrtModel):
    """A decoder graph with a growing cache, passed in and out as arrays."""

    def __call__(
        self,
        input_ids: I64,
        attention_mask: I64,
        position_ids: I64,
        past: Sequence[KV],
        num_logits: int = ALL_LOGITS,
    ) -> DecoderOutput:
        inputs = {TOKENS: input_ids, MASK: attention_mask, POSITIONS: position_ids}
        return self.run(self.feeds(inputs, past, num_logits))


class OrtEncoder(OrtModel):
    """An encoder graph: from a batch by input name to its outputs by name."""

    def __call__(self, inputs: Inputs) -> dict[str, F32]:
        names = self.interface.outputs
        found = run_session(self.session, names, self.interface.named(inputs))
        return {name: np.asarray(a, dtype=np.float32) for name, a in zip(names, found, strict=True)}


class OrtRowsStream(OrtModel, Stream):
    """A decoder graph that knows how long each row is, as a stream: rows are padded on the right.

    Its cache is static, of ``capacity`` slots, and the graph is told where to write; or it grows, as with
    GroupQueryAttention, and the next token of a row overwrites its padding.
    """

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
        self._past = self.empty_past(len(rows), self.capacity if self.interface.static else 0)
        self._slots = 0
        return self._run(ids, positions, start, np.array([len(row) for row in rows]), num_logits)

    def decode(self, tokens: Sequence[int]) -> F32:
        start, ids = self._lengths, np.array(tokens, dtype=np.int64)[:, None]
        return self._run(ids, start[:, None], start, np.ones_like(start))[:, 0]

    def extend(self, owners: Sequence[int], rows: Sequence[NDArray[Any]]) -> F32:
        picked, lengths = np.asarray(owners), np.array([len(row) for row in rows])
        if self.interface.static:
            start, (ids, offsets) = self._lengths[picked], right_padded(rows)
            self._past = [tuple(side[picked] for side in entry) for entry in self._past]
            return self._run(ids, start[:, None] + offsets, start, lengths)[
                prefix_mask(lengths, ids.shape[1])
            ]
        # Row by row: onnxruntime's operator can append several tokens only at batch size 1.
        forks = [self._alone(owner) for owner in owners]
        logits = [fork.extended(row) for fork, row in zip(forks, rows, strict=True)]
        self._lengths = self._lengths[picked] + lengths
        self._slots = int(self._lengths.max())
        entries = zip(*(fork._past for fork in forks), strict=True)
        self._past = [
            tuple(self._stacked(sides, grows=n < len(self.kv_layers)) for sides in zip(*parts, strict=True))
            for n, parts in enumerate(entries)
        ]
        return np.concatenate(logits)

    def _alone(self, owner: int) -> OrtRowsStream:
        """One row of this stream, without the padding of its keys and values."""
        fork, slots, kv = self.fork(), int(self._lengths[owner]), len(self.kv_layers)
        fork._past = [
            tuple(side[owner : owner + 1, :, :slots] if n < kv else side[owner : owner + 1] for side in entry)
            for n, entry in enumerate(self._past)
        ]
        fork._lengths, fork._slots = self._lengths[owner : owner + 1], slots
        return fork

    def extended(self, row: NDArray[Any]) -> F32:
        """Logits [tokens, vocab] of the tokens ``row`` after the only row."""
        positions = self._lengths[:, None] + np.arange(len(row))
        logits: F32 = self._run(row[None].astype(np.int64), positions, self._lengths, np.array([len(row)]))[0]
        return logits

    def _stacked(self, arrays: Sequence[F32], grows: bool) -> F32:
        """States, or keys and values, with zeros where a row is shorter."""
        missing = [((0, 0), (0, 0), (0, self._slots - one.shape[2]), (0, 0)) for one in arrays if grows]
        padded = map(np.pad, arrays, missing) if grows else arrays
        stacked: F32 = np.concatenate(list(padded))
        return stacked

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        return self._past, prefix_mask(self._lengths, self._slots)

    def reserve(self, tokens: int) -> None:
        # The cache is allocated for each prefill; the current batch needs no more slots than its rows.
        self.capacity = tokens

    def _run(self, ids: I64, positions: I64, start: I64, lengths: I64, num_logits: int = ALL_LOGITS) -> F32:
        """Logits [rows, tokens, vocab] of rows of these ``lengths``, padded to ``ids``, after ``start`` tokens."""
        self._lengths, self._slots = start + lengths, self._slots + ids.shape[1]
        inputs = {TOKENS: ids, POSITIONS: positions}
        if self.interface.static:
            tokens, self._slots = int(start.max()) + ids.shape[1], self.capacity
            if tokens > self.capacity:
                raise InputError(
                    f"{tokens} tokens do not fit into a static cache of {self.capacity} slots: use shorter rows."
                )
            inputs[WRITE_INDICES] = start
        else:
            inputs[MASK] = prefix_mask(self._lengths, self._slots).astype(np.int64)
        output = self.run(self.feeds(inputs, self._past, num_logits))
        self._past = output.present
        return output.logits


def ort_stream(
    path: Path, capacity: int, rounded: bool = True, small: bool = False, watch: Watch | None = None
) -> Stream:
    """The decoder graph at ``path`` as a stream of up to ``capacity`` tokens a row; ``watch`` is told of each run.

    ``rounded`` and ``small``: see :func:`~nbl_export.runtime.session.session`.
    """
    interface = interface_of(load_graph(path))
    if interface.static or interface.ragged:
        return OrtRowsStream(path, capacity, rounded, small, watch)
    decoder = OrtDecoder(path, rounded=rounded, small=small, watch=watch)
    if interface.cacheless:
        return UncachedStream(lambda ids, mask, positions: decoder(ids, mask, positions, ()).logits)
    return PastStream(decoder)
