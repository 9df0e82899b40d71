"""Read what a model keeps between tokens, block by block, and make transformers' caches that hold it.

Softmax attention keeps keys and values, which grow with each token. Other layers keep states of a fixed size: a
convolution its last inputs, a state-space model or a linear attention one matrix for each head. A block may keep both,
one of them, or nothing. An *entry* holds the tensors of one block: keys and values if it has its own, then its states.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

Entry = tuple[torch.Tensor, ...]
_CONV, _RECURRENT = "conv", "recurrent"


@dataclass(frozen=True)
class CacheShape:
    """One layer's cache: keys [batch, heads, length, key_size], values [batch, heads, length, value_size]."""

    heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class StateShape:
    """A state [batch, *shape]; ``kind`` is conv or recurrent, with a number from the second of its kind on."""

    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BlockCache:
    """What a block keeps: keys and values of its own, states, both or neither."""

    kv: CacheShape | None = None
    states: tuple[StateShape, ...] = ()

    def empty(self, like: torch.Tensor, batch: int, slots: int = 0) -> Entry:
        """The entry before the first token, in the dtype and on the device of ``like``."""
        kv = self.kv
        shapes = [(kv.heads, slots, kv.key_size), (kv.heads, slots, kv.value_size)] if kv else []
        return tuple(like.new_zeros(batch, *shape) for shape in (*shapes, *(s.shape for s in self.states)))

    def parts(self, entry: Entry) -> tuple[Entry, Entry]:
        """Of an ``entry`` of this block its keys and values, and its states."""
        of_kv = 2 if self.kv else 0
        return entry[:of_kv], entry[of_kv:]


@contextmanager
def limited_steps(model: torch.nn.Module) -> Iterator[None]:
    """Within the block, a step of a state-space model has the limits of its time step, as a pass over a text has.

    transformers forgets them in steps, so that a text and its tokens one by one end in different states.
    """
    limits = {
        (sys.modules[type(module).__module__], tuple(cast("tuple[float, float]", module.time_step_limit)))
        for module in model.modules()
        if hasattr(module, "time_step_limit")
    }
    step = "mamba2_selective_state_update"
    with ExitStack() as undo:
        for file, limit in limits:
            if own := getattr(file, step, None):
                undo.callback(setattr, file, step, own)
                setattr(file, step, partial(_limited, own, limit))
        yield


def _limited(
    own: Any, limit: tuple[float, ...], state: Any, hidden: Any, dt: Any, *args: Any, **options: Any
) -> Any:
    bias = options.pop("dt_bias", None)
    dt = dt if bias is None else dt + bias
    dt = torch.nn.functional.softplus(dt) if options.pop("dt_softplus", False) else dt
    return own(state, hidden, torch.clamp(dt, *limit), *args, **options)


def block_caches(cache: Any, count: int) -> tuple[BlockCache, ...]:
    """What each of ``count`` blocks keeps, by a filled cache of transformers."""
    layers = [*getattr(cache, "layers", []), *[None] * count]
    found = []
    for index in range(count):
        keys, values = (getattr(layers[index], name, None) for name in ("keys", "values"))
        kv = None
        if keys is not None and values is not None and keys.ndim == 4 and keys.shape[:3] == values.shape[:3]:
            kv = CacheShape(int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3]))
        states = (StateShape(kind, tuple(state.shape[1:])) for kind, state in _states(cache, index))
        found.append(BlockCache(kv, tuple(states)))
    return tuple(found)


def _states(cache: Any, index: int) -> Iterator[tuple[str, torch.Tensor]]:
    linear, layers = getattr(cache, "linear_cache", ()), getattr(cache, "layers", ())
    if index < len(linear) and isinstance(linear[index], torch.Tensor):
        yield _RECURRENT, linear[index]
        return
    layer: Any = layers[index] if index < len(layers) else None
    for number in range(getattr(layer, "number_of_states", 0)):
        for kind, held in ((_CONV, layer.conv_states), (_RECURRENT, layer.recurrent_states)):
            if held[number] is not None:
                yield f"{kind}{number or ''}", held[number]


class PastLayer(DynamicLayer):  # type: ignore[misc]
    """A cache layer whose past length is given, not read from the shape of its keys.

    transformers takes the past length from the first layer. A linearized layer has no keys, so the length must be
    given. Every layer has the full length, also if the model's own cache would be a sliding window: the window is
    applied by the mask.
    """

    def __init__(self, past_length: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.past_length = past_length
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def get_seq_length(self, *_args: Any) -> Any:
        return self.past_length

    def get_mask_sizes(self, query: Any) -> tuple[Any, int]:
        return self.past_length + query_length(query), 0


def query_length(query: Any) -> Any:
    """The number of queries given to a cache or mask function; transformers 5.0 passes their slots [sequence]."""
    return query.shape[0] if hasattr(query, "shape") else query


class StateLayer(LinearAttentionLayer):  # type: ignore[misc]
    """A cache layer that holds ``states`` of these ``shapes``; none yet if it is ``fresh``."""

    def __init__(self, shapes: Sequence[StateShape], states: Sequence[torch.Tensor], fresh: bool) -> None:
        numbers = [_number(shape.kind) for shape in shapes]
        LinearAttentionLayer.__init__(self, number_of_states=max(numbers, default=0) + 1)
        for number, shape, state in zip(numbers, shapes, states, strict=True):
            if fresh:
                continue
            self.has_previous_state[number] = True
            self.dtype, self.device = state.dtype, state.device
            if shape.kind.startswith(_CONV):
                # A copy: transformers overwrites a state in place.
                self.conv_states[number], self.is_conv_states_initialized[number] = state.clone(), True
                self.conv_kernel_size[number] = state.shape[-1]
            else:
                self.recurrent_states[number] = state.clone()
                self.is_recurrent_states_initialized[number] = True


def _number(kind: str) -> int:
    return int(kind.removeprefix(_CONV).removeprefix(_RECURRENT) or 0)


def cache_layer(
    block: BlockCache, entry: Entry, past_length: Any, of_states: type[StateLayer] = StateLayer
) -> Any:
    """transformers' cache layer of a block after ``past_length`` tokens, which are in its ``entry``."""
    pair, states = block.parts(entry)
    past = PastLayer(past_length, *(pair or _NOTHING))
    if not block.states:
        return past
    made = of_states(block.states, states, isinstance(past_length, int) and past_length == 0)
    if not block.kv:
        return made
    both: Any = object.__new__(type("HybridLayer", (type(made), PastLayer), {}))
    vars(both).update(vars(made) | vars(past))
    return both


_NOTHING = (torch.zeros(1, 1, 0, 1), torch.zeros(1, 1, 0, 1))


def cache_with(layers: Sequence[Any], own_class: type[Any] | None = None) -> Any:
    """A cache of transformers with these ``layers``, or of the model's ``own_class``."""
    cache = DynamicCache() if own_class is None else own_class()
    cache.layers = list(layers)
    if own_class is not None:
        cache.linear_cache = [getattr(layer, "recurrent_states", {}).get(0) for layer in layers]
    return cache


def entry_in(cache: Any, index: int, block: BlockCache) -> Entry:
    """What ``cache`` holds for a ``block``, the one with that ``index``."""
    layer = cache.layers[index]
    pair = (layer.keys, layer.values) if block.kv else ()
    return (*pair, *(state for _, state in _states(cache, index)))
