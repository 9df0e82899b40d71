"""What neither a model's configuration nor its modules say: tried out, once, by one tiny forward pass.

How many values its attention returns, how many heads of which size its KV cache has in each layer, whether
it is causal, what it gives. Configurations spell these in many ways, or not at all; the numbers say it for every
family.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nbl_export.batch.names import PIXELS, TOKENS
from nbl_export.errors import InputError
from nbl_export.models.compat import cache_argument
from nbl_export.models.layers import (
    accepted_arguments,
    attention_layers,
    image_shape,
    layer_count,
    main_input,
    structure,
)
from nbl_export.models.load import quiet
from nbl_export.models.tasks import GENERATION, Task, task_named

if TYPE_CHECKING:
    import torch

_TOKENS = 8


@dataclass(frozen=True)
class CacheShape:
    """One layer's cache: keys [batch, heads, length, key_size], values [batch, heads, length, value_size]."""

    heads: int
    key_size: int
    value_size: int


@dataclass(frozen=True)
class DummyRun:
    """``returns``: by layer, the length of the tuple that its attention returns; None for a bare tensor.
    ``block_returns``: the same of every block.

    ``cache`` has an entry for each block, None for one that keeps no keys and values of its own. ``tokens`` is
    how many its attention sees of one row, ``outputs`` what it gives. ``mapped`` says whether y is what a linear
    map writes, so that nothing is added to it inside; ``same`` whether a second pass over images gave the same.
    """

    returns: Mapping[int, int | None]
    cache: tuple[CacheShape | None, ...]
    causal: bool
    tokens: int = _TOKENS
    outputs: tuple[str, ...] = ()
    mapped: bool = True
    same: bool = True
    block_returns: Mapping[int, int | None] = field(default_factory=dict)


_DONE: weakref.WeakKeyDictionary[torch.nn.Module, DummyRun] = weakref.WeakKeyDictionary()


def dummy_run(model: torch.nn.Module) -> DummyRun:
    """What one forward pass of the *original* ``model`` showed; the first call makes it.

    Raises :class:`InputError` if the model cannot be run.
    """
    if model not in _DONE:
        _DONE[model] = _try(model)
    return _DONE[model]


def cache_shapes(model: torch.nn.Module) -> tuple[CacheShape, ...]:
    """The cache of every block; raises :class:`InputError` for a model with a block that has none."""
    shapes = dummy_run(model).cache
    if without := [i for i, shape in enumerate(shapes) if shape is None]:
        raise InputError(
            f"Layer {without[0]} of {type(model).__name__} keeps no keys and values of its own in the cache: a graph "
            "with a KV cache cannot be made of it yet; use --kv-cache none."
        )
    return tuple(shape for shape in shapes if shape is not None)


def check_served(model: torch.nn.Module, cached: bool = True, task: Task | None = None) -> None:
    """Refuse, before any work, a model whose structure is not served, or that is not what its ``task`` says.

    ``cached`` asks for a KV cache that every layer of a decoder has its part in.
    """
    found, task = structure(model), task or task_named(GENERATION)
    tried = dummy_run(model)
    if task.causal and not tried.causal:
        raise InputError(
            f"{type(model).__name__} is not causal (an earlier token depends on a later token), so it is no decoder: "
            "if it is an encoder, `architectures` in its config.json must name its encoder class, as BertModel."
        )
    if not task.causal:
        _check_encoder(model, tried, task)
        return
    keeps = {layer.index: tried.cache[layer.index] is not None for layer in found.layers}
    if len(set(keeps.values())) > 1:  # none at all is a family without a cache
        borrower = next(index for index, keeps_own in keeps.items() if not keeps_own)
        raise InputError(
            f"Layer {borrower} of {type(model).__name__} attends to keys and values of another layer, which therefore "
            "cannot be linearized alone: this architecture is not served yet."
        )
    if cached and found.others:
        index, kind = next(iter(found.others.items()))
        raise InputError(
            f"{len(found.others)} layers of {type(model).__name__} are no self-attention (layer {index}: {kind}), and "
            "their state is no KV cache: use --kv-cache none."
        )
    if cached:
        cache_shapes(model)


def _check_encoder(model: torch.nn.Module, tried: DummyRun, task: Task) -> None:
    name = type(model).__name__
    if tried.causal:
        raise InputError(
            f"{name} is a decoder without its language-model head: only decoders with it are served, saved as "
            f"{name.removesuffix('Model')}ForCausalLM."
        )
    if not tried.mapped:
        raise InputError(
            f"The attention of {name} does more after its output projection (a sum or a norm), so that its output is "
            "not the attention's alone: this architecture is not served yet."
        )
    if not tried.same or (main_input(model) == TOKENS and tried.tokens != _TOKENS):
        raise InputError(
            f"{name} does not give each row's tokens to its attention as they are: this architecture is not served "
            "yet."
        )
    if not set(task.outputs) & set(tried.outputs):
        raise InputError(
            f"{name} gives none of {', '.join(task.outputs)}: this architecture is not served yet."
        )


def example_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Two rows of the model's main input that differ in their last token, or two images.

    Raises :class:`InputError` for a model that reads neither tokens nor pixels.
    """
    import torch

    like = next(model.parameters())
    name = main_input(model)
    if name == PIXELS:
        generator = torch.Generator().manual_seed(0)
        return {PIXELS: torch.randn(2, *image_shape(model), generator=generator).to(like)}
    if name != TOKENS:
        raise InputError(f"{type(model).__name__} reads {name}: only tokens and images are served.")
    ids = torch.arange(_TOKENS, device=like.device)[None].repeat(2, 1) % 4 + 1
    ids[1, -1] = 0 if getattr(model.config, "pad_token_id", None) != 0 else 5  # type: ignore[union-attr]
    return {TOKENS: ids}


def _try(model: torch.nn.Module) -> DummyRun:
    import torch

    returns: dict[int, int | None] = {}
    block_returns: dict[int, int | None] = {}
    written: list[torch.Tensor] = []
    mapped: list[torch.Tensor] = []
    inputs = example_inputs(model)
    layers = attention_layers(model)
    with ExitStack() as hooks, torch.inference_mode(), quiet():
        stack = layers[0].block.rpartition(".")[0]
        watched = [(returns, layer.index, layer.attention) for layer in layers]
        watched += [(block_returns, i, f"{stack}.{i}") for i in range(layer_count(model))]
        for store, index, path in watched:

            def note(
                _module: Any,
                _args: Any,
                output: Any,
                store: dict[int, int | None] = store,
                index: int = index,
            ) -> None:
                store[index] = len(output) if isinstance(output, tuple) else None

            hooks.callback(model.get_submodule(path).register_forward_hook(note).remove)

        def write(_module: Any, _args: Any, output: Any) -> None:
            written.append(output[0] if isinstance(output, tuple) else output)

        def keep(_module: Any, _args: Any, output: Any) -> None:
            mapped.append(output)

        y = model.get_submodule(layers[-1].output)
        for module in y.modules():
            # A matrix, also where a convolution or a transposed map is made of it; a norm has a vector.
            if getattr(getattr(module, "weight", None), "ndim", 0) >= 2:
                hooks.callback(module.register_forward_hook(keep).remove)
        hooks.callback(y.register_forward_hook(write).remove)
        try:
            output = model(**inputs, **accepted_arguments(model, use_cache=True))
            if PIXELS in inputs:
                model(**inputs)
        except Exception as error:  # a model's own code may raise anything
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{type(model).__name__} cannot be run: {said[:300]}.") from error
    if silent := [layer.index for layer in layers if layer.index not in returns]:
        raise InputError(
            f"{type(model).__name__} does not run the attention of layer {silent[0]} as it stands, but puts another in "
            "its place: this architecture is not served yet."
        )
    first, states = written[0], written[-1]
    seen = states[:, :-1].float()
    causal = TOKENS in inputs and bool((seen[0] - seen[1]).norm() <= 1e-3 * seen[0].norm())
    cache = output.get(cache_argument(model))
    return DummyRun(
        returns,
        _cache(cache, layer_count(model)),
        causal,
        tokens=states.shape[1],
        outputs=tuple(name for name, value in output.items() if isinstance(value, torch.Tensor)),
        mapped=any(isinstance(m, torch.Tensor) and _same(m, states) for m in mapped),
        same=_same(first, states),
        block_returns=block_returns,
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() == b.numel() and bool((a.reshape(-1) == b.reshape(-1)).all())


def _cache(cache: Any, count: int) -> tuple[CacheShape | None, ...]:
    layers = list(getattr(cache, "layers", []))[:count]
    shapes = [_shape(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    return (*shapes, *[None] * (count - len(shapes)))


def _shape(keys: torch.Tensor | None, values: torch.Tensor | None) -> CacheShape | None:
    if keys is None or values is None or keys.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        return None
    return CacheShape(int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3]))
