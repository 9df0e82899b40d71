"""Facts about a model that its configuration and modules do not give, found by a tiny forward pass.

These are the number of values its attention returns, the heads and head_dim of its KV cache in each layer, whether it
is causal, and its outputs. Configurations have different keys for these, or none; a forward pass works for every
family.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbl_export.batch.names import PIXELS, TOKENS
from nbl_export.blocks import Block, Mlp, layer_of
from nbl_export.errors import InputError, first_line
from nbl_export.models.compat import cache_argument, with_head
from nbl_export.models.layers import (
    accepted_arguments,
    attention_layers,
    backbone,
    image_shape,
    layer_count,
    main_input,
    observed,
    scoring_head,
    structure,
)
from nbl_export.models.load import quiet
from nbl_export.models.mlps import MlpPaths, WatchedMlps, mlp_paths
from nbl_export.models.sharing import shared_keys
from nbl_export.models.tasks import FEATURES, GENERATION, Task, task_named
from nbl_export.models.weights import origin, weights_like

if TYPE_CHECKING:
    import torch

    from nbl_export.models.caches import BlockCache, CacheShape

_TOKENS = 8
_LOGITS = ("logits",)


@dataclass(frozen=True)
class DummyRun:
    """``returns``: of each attention and MLP, the length of the tuple that it returns; None for a bare tensor.
    ``block_returns``: the same for every block.

    ``cache`` says what each block keeps; ``cache_class`` is the model's own class for all of it, None for the usual
    one. ``tokens`` is the number of tokens that attention sees per row, ``outputs`` are the names of the outputs.
    ``linear_output`` says whether y is the output of a linear layer, so that nothing is added to it inside the
    attention; ``repeatable`` whether a second pass over images gave the same result; ``separate`` whether blocks take
    nothing but states from each other, those aside that have no keys and values of their own: ``shared`` has the layer
    whose they attend to, by layer. ``odd`` says of the first attention that does not take and return states as others
    do what is odd about it. ``mlp_streams`` has the module that reads the residual stream before each MLP, by layer;
    ``odd_mlps`` what is odd about others.
    """

    returns: Mapping[Block, int | None]
    cache: tuple[BlockCache, ...]
    causal: bool
    tokens: int = _TOKENS
    outputs: tuple[str, ...] = ()
    linear_output: bool = True
    repeatable: bool = True
    block_returns: Mapping[int, int | None] = field(default_factory=dict)
    separate: bool = True
    shared: Mapping[int, int] = field(default_factory=dict)
    odd: str = ""
    cache_class: type[Any] | None = None
    mlp_streams: Mapping[int, str] = field(default_factory=dict)
    odd_mlps: Mapping[int, str] = field(default_factory=dict)


_DONE: weakref.WeakKeyDictionary[torch.nn.Module, DummyRun] = weakref.WeakKeyDictionary()


def dummy_run(model: torch.nn.Module) -> DummyRun:
    """The facts found by a forward pass of the *original* ``model``, which is run at the first call.

    Raises :class:`InputError` if the model cannot be run.
    """
    known = origin(model)
    if known not in _DONE:
        _DONE[known] = _run(model)
    return _DONE[known]


def is_known(model: torch.nn.Module) -> bool:
    """Whether the forward pass of :func:`dummy_run` was made already."""
    return origin(model) in _DONE


def cache_shapes(model: torch.nn.Module) -> dict[int, CacheShape]:
    """The shape of the keys and values of each block that has its own, by its index."""
    return {i: block.kv for i, block in enumerate(dummy_run(model).cache) if block.kv is not None}


def check_supported(
    model: torch.nn.Module,
    cached: bool = True,
    task: Task | None = None,
    pooled: bool = False,
    states: bool = False,
) -> None:
    """Refuse, before any work, a model whose structure is not supported or does not match its ``task``.

    ``cached`` requires that a decoder has a KV cache, ``states`` allows layers that keep something else than keys and
    values. A decoder without its head is served if its states are ``pooled``.
    """
    found, task = structure(model), task or task_named(GENERATION)
    facts = dummy_run(model)
    if task.causal and not facts.causal:
        raise InputError(
            f"{type(model).__name__} is not causal (an earlier token depends on a later token), so it is not a "
            "decoder: if it is an encoder, name its encoder class, as BertModel, in `architectures` in its config.json."
        )
    if not task.causal:
        _check_encoder(model, facts, task, pooled)
    if facts.odd:
        raise InputError(
            f"The attention of {type(model).__name__} does not take and return [rows, tokens, width] ({facts.odd}): "
            "this architecture is not supported yet."
        )
    if not task.causal:
        return
    has_cache = {layer.index: facts.cache[layer.index].kv is not None for layer in found.layers}
    without = [index for index, own in has_cache.items() if not own and index not in facts.shared]
    if any(has_cache.values()) and without:  # a family without any cache is allowed
        raise InputError(
            f"Layer {without[0]} of {type(model).__name__} has no keys and values of its own, and which layer's it "
            "attends to cannot be seen: this architecture is not supported yet."
        )
    if not cached:
        return
    if not cache_shapes(model):
        raise InputError(
            f"{type(model).__name__} has no keys and values of its own in a KV cache, so a graph with a cache is not "
            "supported yet: use --kv-cache none."
        )
    if not states and (other := {**found.others, **state_kinds(model)}):
        index, kind = next(iter(other.items()))
        raise InputError(
            f"{len(other)} layers of {type(model).__name__} are not self-attention (layer {index}: {kind}), and a "
            "graph with a static cache or of another exporter has no inputs for their states: use --exporter torch "
            "with --kv-cache concat."
        )


def state_kinds(model: torch.nn.Module) -> dict[int, str]:
    """The states of each block that keeps any, by its index, in words."""
    cache = dummy_run(model).cache
    return {i: " and ".join(s.kind for s in b.states) for i, b in enumerate(cache) if b.states}


def _check_encoder(model: torch.nn.Module, facts: DummyRun, task: Task, pooled: bool) -> None:
    name = type(model).__name__
    if facts.causal and task.pools and scoring_head(model) is None:
        raise InputError(
            f"{name} is a decoder whose classification head is not one linear layer on the states of the last token: "
            "this architecture is not supported yet."
        )
    if facts.causal and task.name == FEATURES and not pooled:
        whole = with_head(model)
        raise InputError(
            f"{name} is a decoder without its language-model head: only decoders with it are supported"
            f"{f', saved as {whole}' if whole else ''}."
        )
    if not facts.linear_output:
        raise InputError(
            f"The attention of {name} has a sum or a norm after its output projection, so its output is not that of "
            "the attention alone: this architecture is not supported yet."
        )
    if not facts.repeatable or (main_input(model) == TOKENS and facts.tokens != _TOKENS):
        raise InputError(
            f"{name} does not pass each row's tokens to its attention unchanged: this architecture is not supported "
            "yet."
        )
    if not set(task.outputs) & set(facts.outputs):
        raise InputError(
            f"{name} has none of the outputs {', '.join(task.outputs)}: this architecture is not supported yet."
        )


def example_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Two rows of the model's main input that differ only in their last token, or two images.

    Raises :class:`InputError` for a model whose main input is neither tokens nor pixels.
    """
    import torch

    like = weights_like(model)
    name = main_input(model)
    if name == PIXELS:
        generator = torch.Generator().manual_seed(0)
        return {PIXELS: torch.randn(2, *image_shape(model), generator=generator).to(like)}
    if name != TOKENS:
        raise InputError(f"{type(model).__name__} reads {name}: only tokens and images are supported.")
    ids = torch.arange(_TOKENS, device=like.device)[None].repeat(2, 1) % 4 + 1
    ids[1, -1] = 0 if getattr(model.config, "pad_token_id", None) != 0 else 5  # type: ignore[union-attr]
    return {TOKENS: ids}


def _run(model: torch.nn.Module) -> DummyRun:
    import torch

    from nbl_export.models.caches import block_caches

    returns: dict[Block, int | None] = {}
    block_returns: dict[Block, int | None] = {}
    written: list[torch.Tensor] = []
    odd: dict[int, str] = {}
    linear_outputs: list[torch.Tensor] = []
    inputs = example_inputs(model)
    layers = attention_layers(model)
    paths = {i: found for i, found in mlp_paths(model).items() if isinstance(found, MlpPaths)}
    # A language-model head has the size of several blocks, and nothing to tell.
    head = getattr(model, "get_output_embeddings", lambda: None)()
    run: Any = model if head is None else backbone(model)
    scored = False
    times: Counter[int] = Counter()
    with ExitStack() as hooks, torch.inference_mode(), quiet():
        stack = layers[0].block.rpartition(".")[0]
        watched: list[tuple[dict[Block, int | None], Block, str]]
        watched = [(returns, layer.index, layer.module) for layer in layers]
        watched += [(returns, Mlp(i), one.module) for i, one in paths.items()]
        watched += [(block_returns, i, f"{stack}.{i}") for i in range(layer_count(model))]
        for store, index, path in watched:

            def note(
                _module: Any,
                _args: Any,
                output: Any,
                store: dict[Block, int | None] = store,
                index: Block = index,
            ) -> None:
                store[index] = len(output) if isinstance(output, tuple) else None

            hooks.callback(model.get_submodule(path).register_forward_hook(note).remove)

        mlps = WatchedMlps(model, paths, stack)
        one_run = hooks.enter_context(ExitStack())
        mlps.watch(one_run)
        handed = Handed()
        for index in range(layer_count(model)):
            block = model.get_submodule(f"{stack}.{index}")
            hooks.callback(block.register_forward_pre_hook(lambda *_, i=index: times.update([i])).remove)
            hooks.callback(block.register_forward_pre_hook(handed.taken, with_kwargs=True).remove)
            hooks.callback(block.register_forward_hook(handed.given).remove)

        def write(_module: Any, _args: Any, output: Any) -> None:
            written.append(output[0] if isinstance(output, tuple | list) else output)

        def look(index: int, *activations: Any) -> None:
            odd.setdefault(index, _oddness(index, *activations))

        def keep(_module: Any, _args: Any, output: Any) -> None:
            linear_outputs.append(output)

        y = model.get_submodule(layers[-1].output)
        for module in y.modules():
            # A matrix, also of a convolution or a transposed layer; the weight of a norm is a vector.
            if getattr(getattr(module, "weight", None), "ndim", 0) >= 2:
                hooks.callback(module.register_forward_hook(keep).remove)
        hooks.callback(y.register_forward_hook(write).remove)
        hooks.enter_context(observed(model, layers, look))
        try:
            output = run(**inputs, **accepted_arguments(run, use_cache=True))
            if PIXELS in inputs:
                one_run.close()  # an MLP that runs twice in one run is odd
                run(**inputs)
        except InputError:  # of its weights
            raise
        except ValueError as error:
            # transformers scores the last token of several rows only where it knows the padding token.
            if scoring_head(model) is None:
                raise unrunnable(model, error) from error
            times.clear()
            output, scored = backbone(model)(**inputs), True
        except Exception as error:  # a model's own code may raise anything
            raise unrunnable(model, error) from error
    once = 2 if PIXELS in inputs else 1
    if repeated := [index for index, count in sorted(times.items()) if count > once]:
        raise InputError(
            f"{type(model).__name__} runs block {repeated[0]} {times[repeated[0]] // once} times in one pass, each "
            "with other states, and one W and b is for one of them: this architecture is not supported."
        )
    if silent := [layer.index for layer in layers if layer.index not in returns]:
        raise InputError(
            f"{type(model).__name__} does not run the attention of layer {silent[0]} as it is, but replaces it at run "
            "time: this architecture is not supported yet."
        )
    first, states = written[0], written[-1]
    cache = getattr(output, "get", lambda _name: None)(cache_argument(run))
    blocks = block_caches(cache, layer_count(model))
    kept = [layer for layer in layers if blocks[layer.index].kv is not None]
    shared: dict[int, int] = {}
    if 0 < len(kept) < len(layers):
        with torch.inference_mode(), quiet():
            shared = shared_keys(
                model, layers, lambda: run(**inputs, **accepted_arguments(run, use_cache=True))
            )
    seen = states[:, :-1].float()
    causal = TOKENS in inputs and bool((seen[0] - seen[1]).norm() <= 1e-3 * seen[0].norm())
    return DummyRun(
        returns,
        blocks,
        causal,
        tokens=states.shape[1],
        outputs=_LOGITS if head is not None or scored else _tensors_of(output),
        linear_output=any(isinstance(m, torch.Tensor) and _same(m, states) for m in linear_outputs),
        repeatable=_same(first, states),
        block_returns={layer_of(i): length for i, length in block_returns.items()},
        separate=not handed.on,
        shared=shared,
        odd=next((what for _, what in sorted(odd.items()) if what), ""),
        cache_class=type(cache) if hasattr(cache, "linear_cache") else None,
        mlp_streams=mlps.streams,
        odd_mlps=mlps.odd,
    )


def _oddness(index: int, residual: torch.Tensor, normed: torch.Tensor, output: Any) -> str:
    """What is odd about the attention of layer ``index``; empty for one as others."""
    shape = getattr(output, "shape", None)
    if shape is None:
        return f"layer {index} returns a {type(output).__name__}"
    if len(shape) == 3 and residual.shape == normed.shape == shape:
        return ""
    given = " and ".join(str(list(t.shape)) for t in (residual, normed))
    return f"layer {index} has a stream and an input of {given} and an output of {list(shape)}"


def unrunnable(model: torch.nn.Module, error: Exception) -> InputError:
    """One sentence for what a model's own code raised."""
    return InputError(f"{type(model).__name__} cannot be run: {first_line(error)[:300]}.")


class Handed:
    """Watches blocks: ``on`` is true once one takes what an earlier one has returned beside its states.

    Such are a table of relative positions that only the first block has, and keys and values that others share.
    """

    def __init__(self) -> None:
        self.on = False
        self._returned: list[torch.Tensor] = []

    def given(self, _block: Any, _args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            self._returned += _tensors(output[1:])

    def taken(self, _block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        found = _tensors((args[1:], list(kwargs.values())))
        shared = any(one is other for one in found for other in self._returned)
        self.on = self.on or shared or any(isinstance(value, dict) for value in (*args, *kwargs.values()))


def _tensors(value: Any) -> list[torch.Tensor]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in _tensors(part)] if isinstance(value, list | tuple) else []


def _tensors_of(output: Any) -> tuple[str, ...]:
    import torch

    named: Any = getattr(output, "items", tuple)()  # a model's own code may return a plain tuple
    return tuple(name for name, value in named if isinstance(value, torch.Tensor))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() == b.numel() and bool((a.reshape(-1) == b.reshape(-1)).all())
