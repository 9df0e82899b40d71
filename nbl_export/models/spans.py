"""Find the spans of layers that one affine map can replace: those whose layers only add to the residual stream.

The map stands where the attention of the first layer was, and everything else of the span is dropped:

    before    h ─► layer a ─► layer a + 1 ─► … ─► layer b ─► h'
    after     h ─► norm ─► MatMul(Wᵀ) ─► Add(b) ─►+ ─► h'
              └───────────────────────────────────┘

So a layer must return h + c · (its attention's y) where its MLP adds nothing, with the same c for every y. This is
tried, not read from the code: in a forward pass every attention gives numbers of our own, and every MLP zeros. A layer
with a norm on y, as of Gemma, or with another path beside the stream, returns something else.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nbl_export.batch.names import TOKENS
from nbl_export.blocks import SPAN, Block, Mlp, Span, spans_of
from nbl_export.errors import InputError
from nbl_export.models.candidates import blocks_of, candidates, check_parts, reasons
from nbl_export.models.dummy_run import dummy_run, example_inputs
from nbl_export.models.layers import (
    BlockModules,
    Observer,
    attention_layers,
    block_stack,
    hidden_states,
    layer_count,
    main_input,
    observed,
)
from nbl_export.models.walk import Segment, Step, passing, segments, walking
from nbl_export.models.weights import origin

if TYPE_CHECKING:
    import torch

# What a layer may return beside h + c · y, relative to c · y: more than rounding to bfloat16, less than any norm.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Adding:
    """``scales``: of each layer that can be in a span, the c that its attention's y is multiplied by where it is added.
    ``why_not``: why the others cannot, in words.
    """

    scales: Mapping[int, float]
    why_not: Mapping[int, str]

    @property
    def spans(self) -> list[Span]:
        """Every span of them."""
        return spans_of(self.scales)


_DONE: weakref.WeakKeyDictionary[torch.nn.Module, Adding] = weakref.WeakKeyDictionary()


def adding(model: torch.nn.Module) -> Adding:
    """Which layers of the *original* ``model`` can be in a span; it is run at the first call."""
    known = origin(model)
    if known not in _DONE:
        _DONE[known] = _found(model)
    return _DONE[known]


def _found(model: torch.nn.Module) -> Adding:
    layers = range(layer_count(model))
    if main_input(model) != TOKENS:
        return Adding({}, dict.fromkeys(layers, "it reads no tokens"))
    if any(part.stop - part.start > 1 for part in segments(model)):
        return Adding({}, dict.fromkeys(layers, "its layers take more than the stream from each other"))
    modules = {one.index: one for one in blocks_of(model)}
    kept = reasons(model)
    scales: dict[int, float] = {}
    why_not: dict[int, str] = {}
    tried = _tried(model, modules.values())
    for layer in layers:
        own = [modules.get(layer), modules.get(Mlp(layer))]
        if own[0] is None or layer in kept:
            why_not[layer] = "its attention cannot become linear"
        elif own[1] is None:
            why_not[layer] = "its MLP cannot become linear"
        elif any(one is not None and one.adds for one in own):
            why_not[layer] = "one of its modules adds the residual itself"
        elif (scale := tried.get(layer)) is None:
            why_not[layer] = (
                "it does more than add its attention and its MLP to the stream, such as a norm between"
            )
        else:
            scales[layer] = scale
    return Adding(scales, why_not)


def _tried(model: torch.nn.Module, modules: Any) -> dict[int, float]:
    """The scale of each layer that returns h + c · y for an attention's output y of our own."""
    import torch

    found: dict[int, float] = {}
    generator = torch.Generator().manual_seed(0)
    given: dict[int, torch.Tensor] = {}
    streams: dict[int, torch.Tensor] = {}

    def instead(_module: Any, _args: Any, output: Any, of: BlockModules[Any]) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        if isinstance(of.index, Mlp):
            y = torch.zeros_like(y)
        else:
            # Tokens of different sizes, which a norm would make alike.
            sizes = torch.logspace(-1, 1, y.shape[-2])[:, None]
            y = given[of.index] = (torch.randn(y.shape, generator=generator) * sizes).to(y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def begins(_module: Any, args: Any, kwargs: Any, layer: int) -> None:
        streams[layer] = hidden_states(args, kwargs)

    def ends(_module: Any, _args: Any, output: Any, layer: int) -> None:
        after = output[0] if isinstance(output, tuple) else output
        h, y = streams.pop(layer), given.pop(layer, None)
        if y is None or h.shape != y.shape or after.shape != y.shape:
            return
        added, y = (after.double() - h.double()), y.double()
        scale = float((added * y).sum() / y.square().sum())
        # Token by token, since small ones are where a norm shows.
        room = _TOLERANCE * (abs(scale) * y.norm(dim=-1) + h.double().norm(dim=-1) * _rounding(h))
        if scale > 0 and bool(((added - scale * y).norm(dim=-1) <= room).all()):
            found[layer] = round(scale, 3 if h.element_size() == 2 else 6)

    path, _ = block_stack(model)
    batch = example_inputs(model)
    dummy_run(model)
    states: Any = None
    with ExitStack() as hooks, torch.inference_mode(), walking(model) as run:
        for one in modules:
            module = model.get_submodule(one.output)
            hooks.callback(module.register_forward_hook(partial(instead, of=one)).remove)
        for layer in range(layer_count(model)):
            block = model.get_submodule(f"{path}.{layer}")
            hooks.callback(
                block.register_forward_pre_hook(partial(begins, layer=layer), with_kwargs=True).remove
            )
            hooks.callback(block.register_forward_hook(partial(ends, layer=layer)).remove)
        for part in segments(model):
            with run(part) as step:
                states = step(batch, states)
    return found


def _rounding(like: torch.Tensor) -> float:
    """How much more than its share of the tolerance a sum in 16 bits is rounded, of the larger summand."""
    return 1.0 if like.element_size() == 2 else 0.0


def choices(model: torch.nn.Module, parts: Collection[str]) -> list[Block]:
    """What can become linear of ``model``, ascending: attentions, MLPs and spans, of these ``parts``."""
    spans = adding(model).spans if SPAN in parts else []
    return sorted([*(one.index for one in candidates(model, parts)), *spans])


def check_blocks(model: torch.nn.Module, parts: Collection[str]) -> None:
    """Refuse ``parts`` of which the ``model`` has none: :class:`InputError` with the reason."""
    check_parts(model, parts)
    if SPAN in parts and not (found := adding(model)).scales:
        [(reason, _)] = Counter(found.why_not.values()).most_common(1)
        raise InputError(
            f"--blocks all asks for spans of layers, and no layer of {type(model).__name__} can be in one ({reason}): "
            "use --blocks both."
        )


@contextmanager
def observing(
    model: torch.nn.Module,
    run: Callable[[Segment], Any],
    part: Segment,
    wanted: Collection[Block],
    observer: Observer[Any],
) -> Iterator[Step]:
    """The step of ``part``, in which ``observer`` is called for each of ``wanted``, which begin in it.

    Rows go on through the longest of the spans among them; the states are those after the part.
    """
    modules = tuple(one for one in blocks_of(model) if one.index in wanted)
    spans = [block for block in wanted if isinstance(block, Span)]
    stop = max([part.stop, *(span.last + 1 for span in spans)])
    with (
        passing(model, run, part, stop) as step,
        observed(model, modules, observer),
        _observed_spans(model, spans, observer),
    ):
        yield step


@contextmanager
def _observed_spans(
    model: torch.nn.Module, spans: Sequence[Span], observer: Observer[Span]
) -> Iterator[None]:
    """Call ``observer(span, residual, normed, output)`` for each of ``spans``, which begin with one layer.

    ``residual`` and ``normed`` are those of the attention of that layer, as :func:`.observed` has them; ``output`` is
    what the span adds to the stream, for an attention's y in its place. Each is [batch, sequence, d].
    """
    if not spans:
        yield
        return
    first = spans[0].layer
    own = next(one for one in attention_layers(model) if one.index == first)
    scale, path = adding(model).scales[first], block_stack(model)[0]
    seen: dict[str, torch.Tensor] = {}

    def stream(_module: Any, args: Any, kwargs: Any) -> None:
        seen["residual"] = hidden_states(args, kwargs)

    def normed(_module: Any, args: Any, kwargs: Any) -> None:
        seen["normed"] = hidden_states(args, kwargs)

    def ends(_module: Any, _args: Any, output: Any, span: Span) -> None:
        after, h = output[0] if isinstance(output, tuple) else output, seen["residual"]
        # A difference of large numbers: in float64 nothing more is lost.
        observer(span, h, seen["normed"], (after.double() - h.double()) / scale)

    with ExitStack() as hooks:
        for name, hook in ((own.stream, stream), (own.module, normed)):
            module = model.get_submodule(name)
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for span in spans:
            block = model.get_submodule(f"{path}.{span.last}")
            # Before the hook that ends the run.
            hooks.callback(block.register_forward_hook(partial(ends, span=span), prepend=True).remove)
        yield
