"""Run a model as a function of tensors: with an explicit KV cache, without a cache, or as an encoder.

An encoder is a function from its positional inputs to the outputs of its task, pooled where it says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from string import ascii_lowercase
from typing import Any, cast

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

from nbl_export.batch import BATCH, EMBEDDINGS, MASK, PER_LAYER, PIXELS, TOKEN_TYPES, TOKENS, Inputs
from nbl_export.models.dummy_run import CONV, BlockCache, Entry, StateShape, dummy_run, states_of
from nbl_export.models.folder import Pooling, Task
from nbl_export.models.layers import backbone, has_per_layer, scoring_head
from nbl_export.models.running import accepted_arguments, cache_argument
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


# passes with a cache ------------------------------------------------------------------------------


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
    """A cache layer that holds ``states`` of these ``shapes``; none yet if ``past_length`` is the number 0.

    The length must be given: transformers 5.25 counts tokens as they are added.
    """

    def __init__(
        self, shapes: Sequence[StateShape], states: Sequence[torch.Tensor], past_length: Any
    ) -> None:
        numbers = [int(shape.kind.lstrip(ascii_lowercase) or 0) for shape in shapes]
        LinearAttentionLayer.__init__(self, number_of_states=max(numbers, default=0) + 1)
        self.past_length = past_length
        fresh = isinstance(past_length, int) and past_length == 0
        for number, shape, state in zip(numbers, shapes, states, strict=True):
            if fresh:
                continue
            self.has_previous_state[number] = True
            self.dtype, self.device = state.dtype, state.device
            if shape.kind.startswith(CONV):
                # A copy: transformers overwrites a state in place.
                self.conv_states[number], self.is_conv_states_initialized[number] = state.clone(), True
                self.conv_kernel_size[number] = state.shape[-1]
            else:
                self.recurrent_states[number] = state.clone()
                self.is_recurrent_states_initialized[number] = True

    def get_seq_length(self, *_args: Any) -> Any:
        return self.past_length


def cache_layer(
    block: BlockCache, entry: Entry, past_length: Any, of_states: type[StateLayer] = StateLayer
) -> Any:
    """transformers' cache layer of a block after ``past_length`` tokens, which are in its ``entry``."""
    pair, states = block.parts(entry)
    past = PastLayer(past_length, *(pair or [torch.zeros(1, 1, 0, 1)] * 2))
    if not block.states:
        return past
    made = of_states(block.states, states, past_length)
    if not block.kv:
        return made
    both: Any = object.__new__(type("HybridLayer", (type(made), PastLayer), {}))
    vars(both).update(vars(made) | vars(past))
    return both


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
    return (*pair, *(state for _, state in states_of(cache, index)))


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
