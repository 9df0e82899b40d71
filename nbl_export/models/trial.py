"""What neither a model's configuration nor its modules say: tried out, once, by one tiny forward pass.

How many values its attention returns, how many heads of which size its KV cache has in each layer, whether
it is causal. Configurations spell these in many ways, or not at all; the numbers say it for every family.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbl_export.errors import InputError
from nbl_export.models.layers import attention_layers, cache_argument, layer_count, structure

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
class Trial:
    """``returns``: by layer, the length of the tuple that its attention returns; None for a bare tensor.

    ``cache`` has an entry for each block, None for one that keeps no keys and values of its own.
    """

    returns: Mapping[int, int | None]
    cache: tuple[CacheShape | None, ...]
    causal: bool


_DONE: weakref.WeakKeyDictionary[torch.nn.Module, Trial] = weakref.WeakKeyDictionary()


def trial(model: torch.nn.Module) -> Trial:
    """What one forward pass of the *original* ``model`` showed; the first call makes it.

    Raises :class:`InputError` if the model cannot be run.
    """
    if model not in _DONE:
        _DONE[model] = _try(model)
    return _DONE[model]


def cache_shapes(model: torch.nn.Module) -> tuple[CacheShape, ...]:
    """The cache of every block; raises :class:`InputError` for a model with a block that has none."""
    shapes = trial(model).cache
    if without := [i for i, shape in enumerate(shapes) if shape is None]:
        raise InputError(
            f"Layer {without[0]} of {type(model).__name__} keeps no keys and values of its own in the cache: a graph "
            "with a KV cache cannot be made of it yet; use --kv-cache none."
        )
    return tuple(shape for shape in shapes if shape is not None)


def check_served(model: torch.nn.Module, cached: bool = True) -> None:
    """Refuse, before any work, a model whose structure is not served, or that is not causal.

    ``cached`` asks for a KV cache that every layer has its part in.
    """
    found = structure(model)
    if not trial(model).causal:
        raise InputError(
            f"{type(model).__name__} is not causal (an earlier token's logits depend on a later token): only "
            "decoder-only language models are served."
        )
    keeps = {layer.index: trial(model).cache[layer.index] is not None for layer in found.layers}
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


def _try(model: torch.nn.Module) -> Trial:
    import torch

    returns: dict[int, int | None] = {}
    device = next(model.parameters()).device
    ids = torch.arange(_TOKENS, device=device)[None].repeat(2, 1) % 4 + 1
    ids[1, -1] = 0
    with ExitStack() as hooks, torch.inference_mode():
        for layer in attention_layers(model):

            def note(_module: Any, _args: Any, output: Any, index: int = layer.index) -> None:
                returns[index] = len(output) if isinstance(output, tuple) else None

            handle = model.get_submodule(layer.attention).register_forward_hook(note)
            hooks.callback(handle.remove)
        try:
            output = model(input_ids=ids, use_cache=True)
        except Exception as error:  # a model's own code may raise anything
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{type(model).__name__} cannot be run: {first[:300]}.") from error
    if silent := [layer.index for layer in attention_layers(model) if layer.index not in returns]:
        raise InputError(
            f"{type(model).__name__} does not run the attention of layer {silent[0]} as it stands, but puts another in "
            "its place: this architecture is not served yet."
        )
    logits = output.logits[:, :-1]
    causal = torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    cache = output.get(cache_argument(model))
    return Trial(returns, _cache(cache, layer_count(model)), causal)


def _cache(cache: Any, count: int) -> tuple[CacheShape | None, ...]:
    layers = list(getattr(cache, "layers", []))[:count]
    shapes = [_shape(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    return (*shapes, *[None] * (count - len(shapes)))


def _shape(keys: torch.Tensor | None, values: torch.Tensor | None) -> CacheShape | None:
    if keys is None or values is None or keys.ndim != 4 or keys.shape[:3] != values.shape[:3]:
        return None
    return CacheShape(int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3]))
