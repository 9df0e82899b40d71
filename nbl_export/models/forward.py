"""Forward passes of a model as functions of tensors: with an explicit KV cache, or without a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from nbl_export.batch.names import TOKENS
from nbl_export.batch.rows import Inputs
from nbl_export.models.compat import cache_argument, query_length
from nbl_export.models.layers import accepted_arguments, layer_count
from nbl_export.models.weights import weights_like


class CachedDecoder(torch.nn.Module):
    """A model as a function of tensors: a form's inputs and a list of past keys and values.

    ``mask`` replaces transformers' attention mask function; None means the original function. ``reads`` is the main
    input: token ids or their embeddings.
    """

    mask: Callable[..., torch.Tensor] | None = None
    reads = TOKENS

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def given(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The model's main input by name: token ids, or embeddings of which the ids may be given, too."""
        if self.reads != TOKENS and not tokens.is_floating_point():
            tokens = self.model.get_input_embeddings()(tokens)  # type: ignore[operator]
        return {self.reads: tokens}


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


def run_with_past(
    model: torch.nn.Module,
    tokens: torch.Tensor | Mapping[str, torch.Tensor],
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    past: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    past_length: Any,
    num_logits: int = 0,
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """One forward pass with an explicit cache, ``past`` by layer: logits, and the updated cache in the same order.

    ``tokens`` are their ids, or the model's main input by name.
    Logits are those of the last ``num_logits`` positions if the model supports it, else of all.
    """
    cache = cache_of(
        model, {index: PastLayer(past_length, *pair) for index, pair in past.items()}, past_length
    )
    output = model(
        **(tokens if isinstance(tokens, Mapping) else {TOKENS: tokens}),
        attention_mask=attention_mask,
        use_cache=True,
        **accepted_arguments(
            model, position_ids=position_ids, **({"logits_to_keep": num_logits} if num_logits else {})
        ),
        **{cache_argument(model): cache},
    )
    return output.logits, [(cache.layers[index].keys, cache.layers[index].values) for index in past]


def cache_of(model: torch.nn.Module, layers: Mapping[int, PastLayer], past_length: Any = 0) -> DynamicCache:
    """transformers' cache for ``model`` with these ``layers`` by their index; the others have no keys.

    transformers indexes the cache by layer.
    """
    cache, none = DynamicCache(), torch.zeros(0)
    cache.layers = [
        layers[index] if index in layers else PastLayer(past_length, none, none)
        for index in range(layer_count(model))
    ]
    return cache


def run_uncached(model: torch.nn.Module, inputs: Inputs) -> Any:
    """The output of ``model`` for a batch by input name, in one forward pass without a cache.

    Pixels are rounded to the model's precision; an input that the model does not accept is left out.
    """
    import torch

    like = weights_like(model)
    tensors = {name: torch.from_numpy(array).to(like.device) for name, array in inputs.items()}
    tensors = {name: t.to(like.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    with torch.inference_mode():
        return model(**accepted_arguments(model, **tensors, use_cache=False))
