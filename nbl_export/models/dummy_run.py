"""Find facts about a model that its configuration and modules do not give, by a tiny forward pass.

These are the number of values its attention returns, the heads and head_dim of its KV cache in each layer, whether it
is causal, and its outputs. Configurations have different keys for these, or none; a forward pass works for every
family.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, TypeVar

import numpy as np
import torch

from nbl_export.batch import PIXELS, TOKENS
from nbl_export.blocks import Block
from nbl_export.errors import InputError, first_line
from nbl_export.models.attention import Routers, shared_keys
from nbl_export.models.layers import (
    NOT_YET,
    attention_layers,
    backbone,
    image_shape,
    language_head,
    layer_count,
    main_input,
    mlp_modules,
    scoring_head,
)
from nbl_export.models.running import (
    Hooks,
    accepted_arguments,
    cache_argument,
    hidden_states,
    observed,
    quiet,
    states_in,
)
from nbl_export.models.weights import origin, weights_like

T = TypeVar("T")
Entry = tuple[torch.Tensor, ...]
CONV, _RECURRENT = "conv", "recurrent"
TINY = 8  # tokens of a row


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


@dataclass
class DummyRun:
    """``returns``: of each attention and MLP, the length of the tuple that it returns; None for a bare tensor.
    ``block_returns``: the same for every block.

    ``cache`` says what each block keeps; ``cache_class`` is the model's own class for all of it, None for the usual
    one. ``tokens`` is the number of tokens that attention sees per row, ``outputs`` are the names of the outputs.
    ``linear_output`` says whether y is the output of a linear layer, so that nothing is added to it inside the
    attention; ``separate`` whether blocks take nothing but states from each other, those aside that have no keys and
    values of their own: ``shared`` has the layer whose they attend to, by layer. ``mlp_streams`` has the module that
    reads the residual stream before each MLP, by layer; ``odd_mlps`` what is odd about others. ``top_k`` says whether
    tokens take the largest of their scores, as they do in a mixture of experts.
    """

    returns: dict[Block, int | None] = field(default_factory=dict)
    block_returns: dict[int, int | None] = field(default_factory=dict)
    cache: tuple[BlockCache, ...] = ()
    cache_class: type[Any] | None = None
    causal: bool = False
    tokens: int = 0
    outputs: tuple[str, ...] = ()
    linear_output: bool = False
    separate: bool = True
    shared: Mapping[int, int] = field(default_factory=dict)
    mlp_streams: dict[int, str] = field(default_factory=dict)
    odd_mlps: dict[int, str] = field(default_factory=dict)
    top_k: bool = False


def of_original(find: Callable[[torch.nn.Module], T]) -> Callable[[torch.nn.Module], T]:
    """``find``, which is called once for a model and all that are made of it, when the *original* is there."""
    done: weakref.WeakKeyDictionary[torch.nn.Module, T] = weakref.WeakKeyDictionary()

    @wraps(find)
    def found(model: torch.nn.Module) -> T:
        known = origin(model)
        if known not in done:
            done[known] = find(model)
        return done[known]

    return found


def cache_shapes(model: torch.nn.Module) -> dict[int, CacheShape]:
    """The shape of the keys and values of each block that has its own, by its index."""
    return {i: block.kv for i, block in enumerate(dummy_run(model).cache) if block.kv is not None}


def state_kinds(model: torch.nn.Module) -> dict[int, str]:
    """The states of each block that keeps any, by its index, in words."""
    cache = dummy_run(model).cache
    return {i: " and ".join(s.kind for s in b.states) for i, b in enumerate(cache) if b.states}


def example_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Two rows of the model's main input that differ only in their last token, or two images.

    Raises :class:`InputError` for a model whose main input is neither tokens nor pixels.
    """
    like = weights_like(model)
    name = main_input(model)
    if name == PIXELS:
        generator = torch.Generator().manual_seed(0)
        return {PIXELS: torch.randn(2, *image_shape(model), generator=generator).to(like)}
    if name != TOKENS:
        raise InputError(f"{type(model).__name__} reads {name}: only tokens and images are supported.")
    ids = torch.arange(TINY, device=like.device)[None].repeat(2, 1) % 4 + 1
    ids[1, -1] = 0 if getattr(model.config, "pad_token_id", None) != 0 else 5  # type: ignore[union-attr]
    return {TOKENS: ids}


def unrunnable(model: torch.nn.Module, error: Exception) -> InputError:
    """One sentence for what a model's own code raised."""
    return InputError(f"{type(model).__name__} cannot be run: {first_line(error)[:300]}.")


class _Watch:
    """What hooks on the modules of a model see in a pass, of which ``facts`` stay."""

    def __init__(self) -> None:
        self.facts = DummyRun()
        self.times: Counter[int] = Counter()
        self.linear: list[Any] = []
        self.states: Any = None  # that the last attention writes
        self.normed: dict[str, Any] = {}
        self._beside: list[torch.Tensor] = []  # what blocks have returned beside their states
        self._shape: Any = None  # of the states of the block that runs
        self._read: Any = None  # of what its MLP reads

    def note(self, output: Any, block: Block) -> None:
        self.facts.returns[block] = _length(output)

    def enter(self, args: Any, kwargs: dict[str, Any], index: int) -> None:
        """A block begins; it may take what an earlier one has returned beside its states.

        Such are a table of relative positions that only the first block has, and keys and values that others share.
        """
        self.times[index] += 1
        if args or "hidden_states" in kwargs:
            self._shape = getattr(hidden_states(args, kwargs), "shape", None)
        given = _tensors((args[1:], list(kwargs.values())))
        handed = any(one is other for one in given for other in self._beside)
        self.facts.separate &= not handed and not any(isinstance(v, dict) for v in (*args, *kwargs.values()))

    def leave(self, output: Any, index: int) -> None:
        self.facts.block_returns[index] = _length(output)
        self._beside += _tensors(output[1:]) if isinstance(output, tuple) else []

    def mlp_reads(self, args: Any, kwargs: dict[str, Any], index: int, path: str) -> None:
        if not args and "hidden_states" not in kwargs:
            self.facts.odd_mlps[index] = "it takes no hidden_states"
            return
        u, rows = hidden_states(args, kwargs), self._shape
        # As it is, or with all tokens of the rows in one list.
        listed = rows is not None and getattr(u, "shape", None) == (rows[:-1].numel(), rows[-1])
        if index in self.facts.mlp_streams or not (listed or getattr(u, "ndim", 0) == 3):
            self.facts.odd_mlps[index] = "it is run more than once, or not on [rows, tokens, width]"
            return
        norms = {path: t for path, t in self.normed.items() if getattr(t, "shape", None) == u.shape}
        same = [path for path, normed in norms.items() if torch.equal(normed, u)]
        self.facts.mlp_streams[index], self._read = same[-1] if same else path, u.shape

    def mlp_writes(self, output: Any, index: int) -> None:
        if getattr(states_in(output), "shape", None) != self._read:
            self.facts.odd_mlps.setdefault(
                index, "it does not return what it was given, [rows, tokens, width]"
            )

    def attention(self, index: int, residual: torch.Tensor, normed: torch.Tensor, output: Any) -> None:
        self.states, shape = output, getattr(output, "shape", ())
        if not (len(shape) == 3 and residual.shape == normed.shape == shape):
            given = " and ".join(str(list(t.shape)) for t in (residual, normed))
            what = list(shape) if hasattr(output, "shape") else f"a {type(output).__name__}"
            raise InputError(
                "Its attention takes and returns other states than [rows, tokens, width] (layer "
                f"{index} has a stream and an input of {given} and an output of {what}): {NOT_YET}."
            )


def _length(output: Any) -> int | None:
    """The length of a tuple that a module returns; None for a bare tensor."""
    return len(output) if isinstance(output, tuple) else None


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


@of_original
def dummy_run(model: torch.nn.Module) -> DummyRun:
    """The facts found by a forward pass of ``model``; raises :class:`InputError` if it cannot be run."""
    name, inputs, layers = type(model).__name__, example_inputs(model), attention_layers(model)
    stack, count = layers[0].block.rpartition(".")[0], layer_count(model)
    # A language-model head has the size of several blocks, and nothing to tell. transformers scores the last token of
    # several rows only where it knows the padding token.
    headed = language_head(model) is not None or scoring_head(model) is not None
    run: Any = backbone(model) if headed else model
    inputs |= accepted_arguments(run, use_cache=True)
    seen = _Watch()
    facts = seen.facts
    routers = Routers([np.ones(inputs[TOKENS].shape, bool)] if TOKENS in inputs else [])
    routers.begin()
    with Hooks(model) as hooks, routers, torch.inference_mode(), quiet():
        for layer in layers:
            hooks.after(layer.module, partial(seen.note, block=layer.index))
        for index in range(count):
            path = f"{stack}.{index}"
            hooks.before(path, partial(seen.enter, index=index))
            hooks.after(path, partial(seen.leave, index=index))
            for child, inner in model.get_submodule(path).named_children():
                if "norm" in f"{child} {type(inner).__name__}".lower():
                    hooks.after(f"{path}.{child}", partial(seen.normed.__setitem__, f"{path}.{child}"))
        for index, mlp in mlp_modules(model).items():
            if not isinstance(mlp, str):
                hooks.before(mlp.module, partial(seen.mlp_reads, index=index, path=mlp.module))
                hooks.after(mlp.module, partial(seen.note, block=mlp.index))
                hooks.after(mlp.output, partial(seen.mlp_writes, index=index))
        last = layers[-1].output
        for child, inner in model.get_submodule(last).named_modules():
            # A matrix, also of a convolution or a transposed layer; the weight of a norm is a vector.
            if getattr(getattr(inner, "weight", None), "ndim", 0) >= 2:
                hooks.after(f"{last}.{child}".rstrip("."), seen.linear.append)
        hooks.enter_context(observed(model, layers, seen.attention))
        try:
            output = run(**inputs)
        except InputError:  # of its weights
            raise
        except Exception as error:  # a model's own code may raise anything
            raise unrunnable(model, error) from error
    if repeated := [index for index, times in sorted(seen.times.items()) if times > 1]:
        raise InputError(
            f"{name} runs block {repeated[0]} {seen.times[repeated[0]]} times in one pass, each with other states, and "
            "one W and b is for one of them: this architecture is not supported."
        )
    if silent := [layer.index for layer in layers if layer.index not in facts.returns]:
        raise InputError(
            f"{name} does not run the attention of layer {silent[0]} as it is, but replaces it at run time: {NOT_YET}."
        )
    cache = getattr(output, "get", lambda _name: None)(cache_argument(run))
    facts.cache = block_caches(cache, count)
    if 0 < sum(facts.cache[layer.index].kv is not None for layer in layers) < len(layers):
        with torch.inference_mode(), quiet():
            facts.shared = shared_keys(model, layers, lambda: run(**inputs))
    named: Any = getattr(output, "items", tuple)()  # a model's own code may return a plain tuple
    tensors = tuple(name for name, value in named if isinstance(value, torch.Tensor))
    before = seen.states[:, :-1].float()
    return replace(
        facts,
        cache_class=type(cache) if hasattr(cache, "linear_cache") else None,
        causal=TOKENS in inputs and bool((before[0] - before[1]).norm() <= 1e-3 * before[0].norm()),
        tokens=seen.states.shape[1],
        top_k=any(choice is not None for choices in routers.passes for choice in choices),
        outputs=("logits",) if headed else tensors,
        linear_output=any(
            isinstance(m, torch.Tensor) and torch.equal(m.reshape(-1), seen.states.reshape(-1))
            for m in seen.linear
        ),
    )


# what blocks keep ---------------------------------------------------------------------------------


def block_caches(cache: Any, count: int) -> tuple[BlockCache, ...]:
    """What each of ``count`` blocks keeps, by a filled cache of transformers."""
    layers = [*getattr(cache, "layers", []), *[None] * count]
    found = []
    for index in range(count):
        keys, values = (getattr(layers[index], name, None) for name in ("keys", "values"))
        own = (
            keys is not None and values is not None and keys.ndim == 4 and keys.shape[:3] == values.shape[:3]
        )
        kv = CacheShape(keys.shape[1], keys.shape[3], values.shape[3]) if own else None  # type: ignore[union-attr]
        states = (StateShape(kind, tuple(state.shape[1:])) for kind, state in states_of(cache, index))
        found.append(BlockCache(kv, tuple(states)))
    return tuple(found)


def states_of(cache: Any, index: int) -> Iterator[tuple[str, torch.Tensor]]:
    linear, layers = getattr(cache, "linear_cache", ()), getattr(cache, "layers", ())
    if index < len(linear) and isinstance(linear[index], torch.Tensor):
        yield _RECURRENT, linear[index]
        return
    layer: Any = layers[index] if index < len(layers) else None
    for number in range(getattr(layer, "number_of_states", 0)):
        for kind, held in ((CONV, layer.conv_states), (_RECURRENT, layer.recurrent_states)):
            if held[number] is not None:
                yield f"{kind}{number or ''}", held[number]
