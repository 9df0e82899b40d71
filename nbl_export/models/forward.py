"""Run a model as a function of tensors: with an explicit KV cache, or without a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from nbl_export.batch.names import EMBEDDINGS, PER_LAYER, TOKENS
from nbl_export.batch.rows import Inputs
from nbl_export.models.caches import Entry, StateLayer, cache_layer, cache_with, entry_in, limited_steps
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import backbone, has_per_layer
from nbl_export.models.libraries import accepted_arguments, cache_argument
from nbl_export.models.weights import weights_like

# Of a decoder that reads embeddings those of each layer, too.
Tokens = torch.Tensor | tuple[torch.Tensor, ...]


class CachedDecoder(torch.nn.Module):
    """A model as a function of tensors: a form's inputs and a list of past keys and values.

    ``mask`` replaces transformers' attention mask function; None means the original function. ``reads`` is the main
    input: token ids or their embeddings, with which those of each layer go together where a model has such.
    """

    mask: Callable[..., torch.Tensor] | None = None
    reads = TOKENS

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def given(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        """The model's main input by name: token ids, or embeddings of which the ids may be given, too."""
        if isinstance(tokens, tuple):
            return dict(zip((EMBEDDINGS, PER_LAYER), tokens, strict=True))
        if self.reads == TOKENS or tokens.is_floating_point():
            return {self.reads: tokens}
        return embedded(self.model, tokens)

    @staticmethod
    def main(tokens: Tokens) -> torch.Tensor:
        """Of the main input the tensor [batch, sequence, …] that there always is."""
        return tokens[0] if isinstance(tokens, tuple) else tokens


def embedded(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The embeddings of ``ids`` [batch, seq], and those of each layer where ``model`` has such, as inputs by name."""
    body: Any = backbone(model)
    found = {EMBEDDINGS: model.get_input_embeddings()(ids)}  # type: ignore[operator]
    return found | ({PER_LAYER: body.get_per_layer_inputs(ids)} if has_per_layer(body) else {})


def run_with_past(
    model: torch.nn.Module,
    tokens: torch.Tensor | Mapping[str, torch.Tensor],
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
    past: Sequence[Entry],
    past_length: Any,
    num_logits: int = 0,
    of_states: type[StateLayer] = StateLayer,
) -> tuple[torch.Tensor, list[Entry]]:
    """One forward pass with an explicit cache of all blocks: logits, and the updated entries.

    ``tokens`` are their ids, or the model's main input by name.
    Logits are those of the last ``num_logits`` positions if the model supports it, else of all. The keys and values of
    a linearized layer are unchanged. ``of_states`` is the cache layer of blocks with states.
    """
    facts = dummy_run(model)
    layers = [cache_layer(*block, past_length, of_states) for block in zip(facts.cache, past, strict=True)]
    cache = cache_with(layers, facts.cache_class)
    # Looking for them takes a while of a step.
    keeps_states = any(block.states for block in facts.cache)
    with limited_steps(model) if keeps_states else nullcontext():
        output = model(
            **(tokens if isinstance(tokens, Mapping) else {TOKENS: tokens}),
            attention_mask=attention_mask,
            use_cache=True,
            **accepted_arguments(
                model, position_ids=position_ids, **({"logits_to_keep": num_logits} if num_logits else {})
            ),
            **{cache_argument(model): cache},
        )
    return output.logits, [entry_in(cache, i, block) for i, block in enumerate(facts.cache)]


def run_uncached(model: torch.nn.Module, inputs: Inputs) -> Any:
    """The output of ``model`` for a batch by input name, in one forward pass without a cache.

    Pixels are rounded to the model's precision; an input that the model does not accept is left out.
    """
    like = weights_like(model)
    tensors = {name: torch.from_numpy(array).to(like.device) for name, array in inputs.items()}
    tensors = {name: t.to(like.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    with torch.inference_mode():
        return model(**accepted_arguments(model, **tensors, use_cache=False))
