"""Run a model as a function of tensors: with an explicit KV cache, without a cache, or as an encoder.

An encoder is a function from its positional inputs to the outputs of its task, pooled where it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nbl_export.batch.names import BATCH, EMBEDDINGS, MASK, PER_LAYER, PIXELS, TOKEN_TYPES, TOKENS
from nbl_export.batch.rows import Inputs
from nbl_export.models.caches import Entry, StateLayer, cache_layer, cache_with, entry_in, limited_steps
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import backbone, has_per_layer, scoring_head
from nbl_export.models.libraries import accepted_arguments, cache_argument
from nbl_export.models.tasks import Pooling, Task
from nbl_export.models.weights import weights_like

SENTENCE = "sentence_embedding"
_STATES, _LOGITS = "last_hidden_state", "logits"
Around = Callable[[torch.Tensor, torch.Tensor], AbstractContextManager[Any]]
INPUT_ORDER = (TOKENS, MASK, TOKEN_TYPES, PIXELS)
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


# encoders -----------------------------------------------------------------------------------------


class Encoder(CachedDecoder):
    """A model as a function from its positional ``inputs`` to its ``outputs``.

    If it is ``scored``, its logits are those of each row's last token. Which that is comes from the mask; transformers
    looks for the padding token, and takes the last token of the row where the configuration names none. With a mask
    it is run within ``around`` it and the tokens.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        pooling: Pooling | None,
        scored: bool = False,
        around: Around | None = None,
    ) -> None:
        super().__init__(model)
        self.around = around
        self.inputs, self.outputs, self.pooling = inputs, outputs, pooling
        self.scored, self.causal = scored, dummy_run(model).causal

    # torch.export needs named arguments; no encoder has more than three.
    def forward(
        self, first: torch.Tensor, second: torch.Tensor | None = None, third: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self.inputs, (first, second, third), strict=False))
        mask = given.get(MASK)
        with nullcontext() if self.around is None or mask is None else self.around(mask, first):
            last = mask is not None and self.scored and self.outputs == (_LOGITS,)
            run: Any = backbone(self.model) if last else self.model
            # No cache, as a decoder would fill by itself: one of a window branches on the length of the text.
            output = run(**given, **self._positions(first, mask), **accepted_arguments(run, use_cache=False))
            if mask is not None and last:
                head: Any = self.model.get_submodule(str(scoring_head(self.model)))
                return (head(last_token(output[_STATES], mask)),)
            found = {name: output[name] for name in self.outputs if name != SENTENCE}
            if mask is not None and self.pooling is not None:
                found[SENTENCE] = pool(self.pooling, output[_STATES], mask)
            return tuple(found[name] for name in self.outputs)

    def _positions(self, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Positions for every row: by default a rotary model uses one row, which RotaryEmbedding does not accept.

        A decoder counts from the first token that is no padding, so that a row has one result, wherever it is padded.
        """
        if self.causal and mask is not None:
            return accepted_arguments(backbone(self.model), position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        rotary = any("rotary" in type(m).__name__.lower() for m in self.model.modules())
        if not rotary or PIXELS in self.inputs:
            return {}
        positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape)
        return accepted_arguments(self.model, position_ids=positions)


def encoder_outputs(
    model: torch.nn.Module, task: Task, pooling: Pooling | None
) -> dict[str, tuple[str, ...]]:
    """The outputs of a graph of ``model``, with their dynamic dimensions."""
    given = set(dummy_run(model).outputs)
    found = {name: dims for name, dims in task.outputs.items() if name in given}
    return found | ({SENTENCE: (BATCH,)} if pooling else {})


def encoder_of(
    model: torch.nn.Module,
    task: Task,
    pooling: Pooling | None,
    inputs: Inputs,
    around: Around | None = None,
) -> Encoder:
    """``model`` as a function of the inputs named in the batch ``inputs``."""
    names = tuple(name for name in INPUT_ORDER if name in inputs)
    scored = task.pools and dummy_run(model).causal
    return Encoder(model, names, tuple(encoder_outputs(model, task, pooling)), pooling, scored, around)


def pool(pooling: Pooling, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One vector [batch, d] for each row of ``states`` [batch, sequence, d].

    ``mask`` [batch, sequence] is 0 on padding.
    """
    if pooling.mode == "cls":
        # The first token that is not padding, since padding may be on the left.
        first = mask.argmax(dim=1)[:, None, None].expand(-1, 1, states.shape[-1])
        vector = states.gather(1, first)[:, 0]
    elif pooling.mode == "lasttoken":
        vector = last_token(states, mask)
    elif pooling.mode == "max":
        hidden = (mask == 0)[..., None]
        vector = states.masked_fill(hidden, torch.finfo(states.dtype).min / 2).amax(dim=1)
    else:
        weights = mask[..., None].to(states.dtype)
        vector = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
    return torch.nn.functional.normalize(vector, dim=-1) if pooling.normalize else vector


def last_token(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The states [batch, d] of each row's last token that is no padding, on whichever side that is."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * places).argmax(dim=1)[:, None, None].expand(-1, 1, states.shape[-1])
    return states.gather(1, last)[:, 0]
