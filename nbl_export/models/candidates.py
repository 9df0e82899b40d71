"""Find what can be linearized: attention layers whose keys and values no other layer attends to, MLPs, and spans.

A span of layers can be replaced by one affine map if its layers only add to the residual stream. The map stands where
the attention of the first layer was, and everything else of the span is dropped:

    before    h ─► layer a ─► layer a + 1 ─► … ─► layer b ─► h'
    after     h ─► norm ─► MatMul(Wᵀ) ─► Add(b) ─►+ ─► h'
              └───────────────────────────────────┘

So a layer must return h + c · (its attention's y) where its MLP adds nothing, with the same c for every y. This is
tried, not read from the code: in a forward pass every attention gives numbers of our own, and every MLP zeros. A layer
with a norm on y, as of Gemma, or with another path beside the stream, returns something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers

from nbl_export.batch import PIXELS, TOKENS
from nbl_export.blocks import ATTENTION, MLP, SPAN, Block, Mlp, Span, part_of, spans_of
from nbl_export.errors import InputError
from nbl_export.models.attention import shared_keys
from nbl_export.models.dummy_run import (
    TINY,
    cache_shapes,
    dummy_run,
    example_inputs,
    of_original,
    state_kinds,
)
from nbl_export.models.folder import FEATURES, GENERATION, Task, task_named
from nbl_export.models.layers import (
    NOT_YET,
    BlockModules,
    attention_layers,
    backbone,
    block_stack,
    layer_count,
    main_input,
    mlp_modules,
    scoring_head,
    structure,
)
from nbl_export.models.running import Hooks, Observer, hidden_states, observed, quiet, states_in
from nbl_export.models.walk import Segment, Step, segments, walking

# What a layer may return beside h + c · y, relative to c · y: more than rounding to bfloat16, less than any norm.
_TOLERANCE = 0.02


def candidates(
    model: torch.nn.Module, parts: Collection[str] = (ATTENTION,)
) -> tuple[BlockModules[Block], ...]:
    """Every attention and MLP of ``model``, of these ``parts``, that can be linearized, in order."""
    kept = reasons(model)
    return tuple(one for one in blocks_of(model) if one.index not in kept and part_of(one.index) in parts)


def choices(model: torch.nn.Module, parts: Collection[str]) -> list[Block]:
    """What can become linear of ``model``, ascending: attentions, MLPs and spans, of these ``parts``."""
    spans = spans_of(adding(model).scales) if SPAN in parts else []
    return sorted([*(one.index for one in candidates(model, parts)), *spans])


def blocks_of(model: torch.nn.Module) -> tuple[BlockModules[Block], ...]:
    """Every attention layer and every MLP of ``model`` that is found, in order."""
    facts = dummy_run(model)
    found: list[Any] = [
        replace(mlp, stream=facts.mlp_streams[index])
        for index, mlp in mlp_modules(model).items()
        if not isinstance(mlp, str) and index in facts.mlp_streams and index not in facts.odd_mlps
    ]
    return tuple(sorted([*attention_layers(model), *found], key=lambda one: one.index))


def block_modules(model: torch.nn.Module, block: Block) -> BlockModules[Block]:
    """Those of ``block``, which must exist."""
    return next(one for one in blocks_of(model) if one.index == block)


def check_blocks(model: torch.nn.Module, parts: Collection[str]) -> None:
    """Refuse ``parts`` of which the ``model`` has none: :class:`InputError` with the reason."""
    name = type(model).__name__
    if MLP in parts and not any(isinstance(one.index, Mlp) for one in blocks_of(model)):
        why = [found for found in mlp_modules(model).values() if isinstance(found, str)]
        why = why or list(dummy_run(model).odd_mlps.values()) or ["it does not run them as they are"]
        raise InputError(
            f"--blocks asks for MLPs, and none of {name} can become linear ({Counter(why).most_common(1)[0][0]}): use "
            "--blocks attention."
        )
    if SPAN in parts and not (found := adding(model)).scales:
        reason = Counter(found.why_not.values()).most_common(1)[0][0]
        raise InputError(
            f"--blocks all asks for spans of layers, and no layer of {name} can be in one ({reason}): use --blocks "
            "both."
        )


def reasons(model: torch.nn.Module) -> Mapping[int, str]:
    """Why each of the other attention layers keeps its attention."""
    readers: dict[int, list[str]] = {}
    for borrower, lender in sorted(dummy_run(model).shared.items()):
        readers.setdefault(lender, []).append(str(borrower))
    found: dict[int, str] = {}
    for lender, (*most, last) in readers.items():
        named = f"layers {', '.join(most)} and {last}" if most else f"layer {last}"
        found[lender] = f"its keys and values are read by {named}"
    return found


def shared_without_numbers(model: torch.nn.Module) -> Mapping[int, int]:
    """The layer whose keys and values each borrowing layer attends to, of a ``model`` on the meta device, by the shapes
    of one pass; empty where its code looks at numbers.
    """
    run: Any = backbone(model)
    tokens = torch.zeros(1, 4, dtype=torch.long, device="meta")
    if main_input(model) == PIXELS:
        return {}
    try:
        with torch.inference_mode(), quiet():
            return shared_keys(model, attention_layers(model), lambda: run(input_ids=tokens, use_cache=True))
    except Exception:  # a model's own code may raise anything
        return {}


def described(model: torch.nn.Module) -> dict[str, Any]:
    """The blocks of ``model`` for a record: their number, the kinds of its candidates, and what the others are."""
    found, kept = structure(model), reasons(model)
    kinds = {layer.index: layer.kind for layer in found.layers}
    others = {**found.others, **{index: f"{kinds[index]}: {why}" for index, why in kept.items()}}
    return {
        "blocks": len(kinds) + len(found.others),
        "kinds": {str(index): kind for index, kind in kinds.items() if index not in kept},
        "others": {str(index): others[index] for index in sorted(others)},
    }


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
    found, task, name = structure(model), task or task_named(GENERATION), type(model).__name__
    facts = dummy_run(model)
    if task.causal and not facts.causal:
        raise InputError(
            f"{name} is not causal (an earlier token depends on a later token), so it is not a decoder: if it is an "
            "encoder, name its encoder class, as BertModel, in `architectures` in its config.json."
        )
    if not task.causal:
        if facts.causal and task.name == FEATURES and not pooled:
            whole = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
            raise InputError(
                f"{name} is a decoder without its language-model head: only decoders with it are supported"
                f"{f', saved as {whole.__name__}' if whole else ''}."
            )
        reasons = {
            "has more than one linear layer on the states of the last token behind it": facts.causal
            and task.pools
            and scoring_head(model) is None,
            "has a sum or a norm after its output projection, so its output is not that of the attention "
            "alone": not facts.linear_output,
            "is not given each row's tokens unchanged": main_input(model) == TOKENS and facts.tokens != TINY,
            f"is in a model with none of the outputs {', '.join(task.outputs)}": not set(task.outputs)
            & set(facts.outputs),
        }
        if why := next((said for said, true in reasons.items() if true), None):
            raise InputError(f"The attention of {name} {why}: {NOT_YET}.")
        return
    own = {layer.index for layer in found.layers if facts.cache[layer.index].kv is not None}
    without = [layer.index for layer in found.layers if layer.index not in own | facts.shared.keys()]
    if own and without:  # a family without any cache is allowed
        raise InputError(
            f"Layer {without[0]} of {name} has no keys and values of its own, and which layer's it attends to cannot "
            f"be seen: {NOT_YET}."
        )
    if cached and not cache_shapes(model):
        raise InputError(
            f"{name} has no keys and values of its own in a KV cache, so a graph with a cache is not supported yet: "
            "use --kv-cache none."
        )
    if cached and not states and (other := {**found.others, **state_kinds(model)}):
        index, kind = next(iter(other.items()))
        raise InputError(
            f"{len(other)} layers of {name} are not self-attention (layer {index}: {kind}), and a graph with a static "
            "cache or of another exporter has no inputs for their states: use --exporter torch with --kv-cache concat."
        )


# spans --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adding:
    """``scales``: of each layer that can be in a span, the c that its attention's y is multiplied by where it is added.
    ``why_not``: why the others cannot, in words.
    """

    scales: Mapping[int, float]
    why_not: Mapping[int, str]


@of_original
def adding(model: torch.nn.Module) -> Adding:
    """Which layers of ``model`` can be in a span."""
    layers = range(layer_count(model))
    if main_input(model) != TOKENS:
        return Adding({}, dict.fromkeys(layers, "it reads no tokens"))
    if any(part.stop - part.start > 1 for part in segments(model)):
        return Adding({}, dict.fromkeys(layers, "its layers take more than the stream from each other"))
    modules = {one.index: one for one in blocks_of(model)}
    scales, kept, why_not = _scales(model, modules), reasons(model), {}
    for layer in layers:
        attention, mlp = modules.get(layer), modules.get(Mlp(layer))
        reasons_of = {
            "its attention cannot become linear": attention is None or layer in kept,
            "its MLP cannot become linear": mlp is None,
            "one of its modules adds the residual itself": any(one and one.adds for one in (attention, mlp)),
            "it does more than add its attention and its MLP to the stream, such as a norm between": layer
            not in scales,
        }
        if found := [why for why, true in reasons_of.items() if true]:
            why_not[layer] = found[0]
    return Adding({layer: scale for layer, scale in scales.items() if layer not in why_not}, why_not)


def _scales(model: torch.nn.Module, modules: Mapping[Block, BlockModules[Any]]) -> dict[int, float]:
    """The scale of each layer that returns h + c · y for an attention's output y of our own."""
    found: dict[int, float] = {}
    generator = torch.Generator().manual_seed(0)
    given: dict[int, torch.Tensor] = {}
    streams: dict[int, torch.Tensor] = {}

    def instead(output: Any, of: BlockModules[Any]) -> Any:
        y = states_in(output)
        if isinstance(of.index, Mlp):
            y = torch.zeros_like(y)
        else:
            # Tokens of different sizes, which a norm would make alike.
            sizes = torch.logspace(-1, 1, y.shape[-2])[:, None]
            y = given[of.index] = (torch.randn(y.shape, generator=generator) * sizes).to(y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def begins(args: Any, kwargs: Any, layer: int) -> None:
        streams[layer] = hidden_states(args, kwargs)

    def ends(output: Any, layer: int) -> None:
        after, h, y = states_in(output), streams.pop(layer), given.pop(layer, None)
        if y is None or h.shape != y.shape or after.shape != y.shape:
            return
        added, y = (after.double() - h.double()), y.double()
        scale = float((added * y).sum() / y.square().sum())
        # Token by token, since small ones are where a norm shows; a sum in 16 bits is rounded by the larger summand.
        rounding = 1.0 if h.element_size() == 2 else 0.0
        room = _TOLERANCE * (abs(scale) * y.norm(dim=-1) + h.double().norm(dim=-1) * rounding)
        if scale > 0 and bool(((added - scale * y).norm(dim=-1) <= room).all()):
            found[layer] = round(scale, 3 if rounding else 6)

    path, batch = block_stack(model)[0], example_inputs(model)
    dummy_run(model)
    states: Any = None
    with Hooks(model) as hooks, torch.inference_mode(), walking(model) as run:
        for one in modules.values():
            hooks.after(one.output, partial(instead, of=one))
        for layer in range(layer_count(model)):
            hooks.before(f"{path}.{layer}", partial(begins, layer=layer))
            hooks.after(f"{path}.{layer}", partial(ends, layer=layer))
        for part in segments(model):
            with run(part) as step:
                states = step(batch, states)
    return found


@contextmanager
def observing(
    model: torch.nn.Module,
    run: Callable[..., AbstractContextManager[Step]],
    part: Segment,
    wanted: Collection[Block],
    observer: Observer[Any],
) -> Iterator[Step]:
    """The step of ``part``, in which ``observer`` is called for each of ``wanted``, which begin in it.

    Of a span ``residual`` and ``normed`` are those of the attention of its first layer, as :func:`.observed` has them;
    ``output`` is what the span adds to the stream, for an attention's y in its place. Rows go on through the longest of
    the spans; the states are those after the part.
    """
    spans = [block for block in wanted if isinstance(block, Span)]
    # Of the whole model: within a part, blocks that are not run have no attention to be found.
    modules = tuple(one for one in blocks_of(model) if one.index in wanted)
    own = next((one for one in attention_layers(model) if spans and one.index == spans[0].layer), None)
    with Hooks(model) as hooks:
        step = hooks.enter_context(run(part, max([part.stop, *(span.last + 1 for span in spans)])))
        hooks.enter_context(observed(model, modules, observer))
        if own:
            scale, path = adding(model).scales[own.index], block_stack(model)[0]
            seen: dict[str, torch.Tensor] = {}

            def keep(args: Any, kwargs: Any, name: str) -> None:
                seen[name] = hidden_states(args, kwargs)

            def ends(output: Any, span: Span) -> None:
                # A difference of large numbers: in float64 nothing more is lost.
                added = (states_in(output).double() - seen["residual"].double()) / scale
                observer(span, seen["residual"], seen["normed"], added)

            for name, place in (("residual", own.stream), ("normed", own.module)):
                hooks.before(place, partial(keep, name=name))
            for span in spans:
                # Before the hook that ends the run.
                hooks.after(f"{path}.{span.last}", partial(ends, span=span), first=True)
        yield step
