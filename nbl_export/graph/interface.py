"""The inputs and outputs of a graph by role: tokens or pixels, mask, positions, KV cache, logits or states.

Only this module knows what each input means, and its value for one row without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch import (
    ALL_LOGITS,
    EMBEDDINGS,
    MASK,
    NUM_LOGITS_TO_KEEP,
    PER_LAYER,
    PIXELS,
    POSITIONS,
    TOKEN_TYPES,
    TOKENS,
    WRITE_INDICES,
    Inputs,
)
from nbl_export.errors import InputError
from nbl_export.graph.cache import KVPair, StatePair, kv_layers, kv_pairs, state_pairs
from nbl_export.graph.cores import roles, visible_cores
from nbl_export.graph.embedding import embedding_of, reads_embeddings
from nbl_export.graph.operators import fused_op

T = TypeVar("T")
_TEXT = (TOKENS, MASK, POSITIONS, TOKEN_TYPES)
# Scalar inputs that some exporters add, and their default value.
SCALARS = {NUM_LOGITS_TO_KEEP: ALL_LOGITS}


@dataclass(frozen=True)
class CacheEntry:
    """One layer's cache: names of past and present (key, value), number of heads, head_dim of keys and of values."""

    past: tuple[str, str]
    present: tuple[str, str]
    heads: int
    sizes: tuple[int, int]


@dataclass(frozen=True)
class StateEntry:
    """A state of fixed size: names of past and present, its shape without the batch, and its dtype."""

    past: str
    present: str
    shape: tuple[int, ...]
    dtype: Any


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of a decoder or encoder graph; ``logits`` names the first of its ``outputs``.

    ``layers`` is the model's layer index of each cache entry. ``ragged`` graphs take rows padded on the right,
    each with its own length; the others take rows padded on the left. ``cacheless`` graphs have attention but
    no KV cache: every step computes all tokens again. ``embedding`` makes the embeddings that a graph reads instead of
    token ids, and positions have ``position_rows``, if they have rows. ``states`` are what other layers keep; in every
    list of names they follow the KV cache. ``inputs`` have their usual names; ``own`` are those that the graph calls
    otherwise.
    """

    inputs: frozenset[str]
    logits: str
    cache: tuple[CacheEntry, ...]
    layers: tuple[int, ...]
    ragged: bool
    cacheless: bool
    scalars: Mapping[str, int] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    embedding: Callable[[Any], Mapping[str, NDArray[Any]]] | None = None
    position_rows: int | None = None
    states: tuple[StateEntry, ...] = ()
    own: Mapping[str, str] = field(default_factory=dict)

    @property
    def static(self) -> bool:
        """Whether the cache is static: a buffer of fixed length."""
        return WRITE_INDICES in self.inputs

    @property
    def in_place(self) -> bool:
        """Whether one buffer, longer than its content, may be bound as past and present at once."""
        return self.static or self.ragged

    @property
    def past_names(self) -> list[str]:
        return [name for entry in self.cache for name in entry.past] + [s.past for s in self.states]

    @property
    def present_names(self) -> list[str]:
        return [name for entry in self.cache for name in entry.present] + [s.present for s in self.states]

    def entries(self, arrays: Sequence[T]) -> tuple[tuple[T, ...], ...]:
        """What belongs to these names, grouped: keys and values of each layer, then each state by itself."""
        of_kv = 2 * len(self.cache)
        pairs = zip(arrays[:of_kv:2], arrays[1:of_kv:2], strict=True)
        return (*pairs, *((state,) for state in arrays[of_kv:]))

    def named(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Those of ``inputs`` that the graph has, and its scalars.

        Token ids are embedded for a graph that reads embeddings, and positions of one row are repeated for one that has
        several.
        """
        if self.embedding is not None and TOKENS in inputs:
            inputs = {**inputs, **self.embedding(inputs[TOKENS])}
        if self.position_rows is not None and POSITIONS in inputs and inputs[POSITIONS].ndim == 2:
            inputs = {**inputs, POSITIONS: np.stack([inputs[POSITIONS]] * self.position_rows)}
        feeds = {self.own.get(name, name): value for name, value in inputs.items() if name in self.inputs}
        return feeds | {name: np.array(value, dtype=np.int64) for name, value in self.scalars.items()}

    def empty_cache(self, batch: int, length: int, dtype: Any) -> dict[str, NDArray[Any]]:
        """Zeros with ``length`` slots for every past input; ``dtype`` is that of keys and values."""
        kv = {
            name: np.zeros((batch, entry.heads, length, size), dtype=dtype)
            for entry in self.cache
            for name, size in zip(entry.past, entry.sizes, strict=True)
        }
        return kv | {s.past: np.zeros((batch, *s.shape), dtype=s.dtype or dtype) for s in self.states}

    def row(self, given: NDArray[Any] | Inputs, dtype: Any) -> dict[str, NDArray[Any]]:
        """All graph inputs for one row, given as token ids or as named inputs [1, …]; the cache is empty.

        Embeddings [1, seq, d] may be given instead of ids.
        """
        if not isinstance(given, Mapping):
            given = {TOKENS: np.asarray(given, dtype=np.int64)[None]}
        if TOKENS not in given and EMBEDDINGS not in given:
            return self.named(given)
        ids = given[TOKENS] if TOKENS in given else np.zeros(given[EMBEDDINGS].shape[:2], dtype=np.int64)
        inputs = {
            MASK: np.ones_like(ids),
            POSITIONS: np.arange(ids.shape[1], dtype=np.int64)[None],
            TOKEN_TYPES: np.zeros_like(ids),
            WRITE_INDICES: np.zeros(1, dtype=np.int64),
            **given,
        }
        return self.named(inputs) | self.empty_cache(1, ids.shape[1] if self.static else 0, dtype)


def interface_of(model: ir.Model) -> Interface:
    """The interface of a decoder or encoder graph.

    Raises :class:`InputError` for an unknown input: such a graph can be rewritten but not run.
    """
    graph, pairs, states, embeds = model.graph, kv_pairs(model), state_pairs(model), reads_embeddings(model)
    found = roles(model)
    usual = {value: name for name, value in found.items()}
    names = [usual.get(v, str(v.name)) for v in graph.inputs]
    known = {*_TEXT, PIXELS, WRITE_INDICES, *SCALARS, *[EMBEDDINGS, PER_LAYER] * embeds}
    known |= {str(v.name) for v in (*(v for p in pairs for v in p.past), *(s.past for s in states))}
    if unknown := [name for name in names if name not in known]:
        raise InputError(
            f"The graph has an input {unknown[0]!r} that nbl-export does not know: export the model with "
            f"{', '.join(_TEXT)}, {PIXELS} and a KV cache only."
        )
    present = {*(v for p in pairs for v in p.present), *(s.present for s in states)}
    outputs = tuple(str(v.name) for v in graph.outputs if v not in present)
    if not outputs:
        raise InputError(
            "The graph is not a decoder: it has no output but its KV cache; export it with logits."
        )
    # A mask that is as long as the tokens stays where all attention of a graph without a cache is linear, and other
    # layers still mix tokens.
    shapes = (found[name].shape for name in (TOKENS, MASK) if name in found)
    lengths = [shape[1] for shape in shapes if shape is not None and len(shape) == 2]
    whole = len(lengths) == 2 and lengths[0] == lengths[1] and lengths[0] is not None
    places = next((v.shape for v in graph.inputs if v.name == POSITIONS), None)
    rows = places[0] if places is not None and len(places) == 3 else None
    return Interface(
        frozenset(names),
        "logits" if "logits" in outputs else outputs[0],
        tuple(map(_entry, pairs)),
        kv_layers(model),
        any((op := fused_op(node)) and op.ragged for node in graph),
        not pairs and not states and (bool(visible_cores(model)) or whole),
        {name: value for name, value in SCALARS.items() if name in names},
        outputs,
        embedding_of(model) if embeds else None,
        rows if isinstance(rows, int) else None,
        tuple(map(_state, states)),
        {name: str(v.name) for name, v in found.items() if v.name != name},
    )


def _entry(pair: KVPair) -> CacheEntry:
    (heads, key_size), (_, value_size) = (pair.geometry(side) for side in (0, 1))
    past, present = ((str(k.name), str(v.name)) for k, v in (pair.past, pair.present))
    return CacheEntry(past, present, heads, (key_size, value_size))


def _state(pair: StatePair) -> StateEntry:
    # NumPy has no bfloat16; such a state is allocated like keys and values.
    dtype = pair.past.dtype
    known = None if dtype in (None, ir.DataType.BFLOAT16) else dtype.numpy()
    return StateEntry(str(pair.past.name), str(pair.present.name), pair.shape, known)
