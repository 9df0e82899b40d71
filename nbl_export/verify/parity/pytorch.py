"""Run PyTorch as the reference of parity, and judge by it what others give for the same text.

A model is read once, and not in every step, since it may not stay in memory: the tokens of the decode steps are known,
so all steps go through a block before the next block is read, each with the cache that the steps before it have left:

    block i in memory ─► prefill ─► cache of i ─► step 1 ─► cache of i ─► step 2 ─► … ─► block i + 1

The model's own code runs with the same cache as in a stream, to the same bits; a small model takes the same path.

Where rounding decides between two nearly equal scores of a mixture of experts, a graph may choose another expert than
PyTorch, and every figure of that token, and of those that attend to it, then is about two different computations. So
the choices are taken from the graph, and PyTorch is run with them; what the figures say is left to the gates as they
are. The choices have a gate of their own: PyTorch's scores of what the graph chose may fall short of those that it
would choose itself by no more than PyTorch's own run in that precision moves a score of that router. Nothing of this is
done where the graph has no routers, or chooses as PyTorch does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nbl_export.batch import BOOL, F32, I64, by_token, differing, moved, shortfall
from nbl_export.graph.interface import interface_of
from nbl_export.graph.io import follow_links, load_graph, scratch
from nbl_export.graph.precision import Precision
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import ORIGINAL, Version, version_of, within
from nbl_export.models.attention import Routers
from nbl_export.models.dummy_run import Entry, cache_shapes, dummy_run
from nbl_export.models.forward import cache_layer, cache_with, entry_in, limited_steps
from nbl_export.models.running import accepted_arguments, cache_argument
from nbl_export.models.walk import Segment, through
from nbl_export.models.weights import device_of, in_precision, resident, room, weights_like
from nbl_export.progress import Listener
from nbl_export.rewrite.routers import load_routed, places_of, routers
from nbl_export.runtime.ort import Watch
from nbl_export.runtime.stream import KV
from nbl_export.settings.choices import FitInput
from nbl_export.verify.parity.compare import Choices, Pass, Recorded, Rows, Text, compare, record
from nbl_export.verify.parity.figures import Parity, Routing, gates_for

OWN = "PyTorch's own in this precision"
# How much further than the measured rounding moves a score a choice may fall short, and the same of float32, of the
# size of the scores.
_ROOM, _FLOAT32 = 1.5, 1e-3


_LAST_BIT = 2.0**-24  # relative, half a unit in the last place of float32


def record_pytorch(
    model: torch.nn.Module,
    plan: Plan | None,
    text: Text,
    routers: Routers | None = None,
    listener: Listener | None = None,
) -> Recorded:
    """What ``model``, with ``plan`` if there is one, gives for ``text``.

    The ``routers`` of a mixture of experts are those of all passes, in their order.
    """
    version, fit_input = (version_of(model, plan), plan.fit_input) if plan else (ORIGINAL, "normed")
    layers = tuple(i for i in cache_shapes(model) if i not in version.layers) if text.cached else None

    def passes() -> Iterator[Pass]:
        for number, batch in enumerate(text.batches):
            fed, first = list(text.passes(batch)), number * (text.steps + 1)
            yield from _by_blocks(model, version, fit_input, fed, layers, routers, first, listener)

    return record(passes(), layers, text, listener, "Running PyTorch")


def _by_blocks(
    model: torch.nn.Module,
    version: Version,
    fit_input: FitInput,
    fed: Sequence[tuple[I64, I64, I64]],
    kv_layers: tuple[int, ...] | None,
    routers: Routers | None,
    first: int,
    listener: Listener | None,
) -> Iterator[Pass]:
    """The passes over what is ``fed``; ``first`` is the number of the first one, as ``routers`` count."""
    cache = None if kv_layers is None else _Cache(model, len(fed[0][0]), kv_layers)
    batches = [_batch(model, one, cache) for one in fed]
    current: list[Segment] = []  # none once the head is run

    @contextmanager
    def of_block(part: Segment) -> Iterator[None]:
        current[:] = [part]
        with within(model, version, part, fit_input):
            yield
        if cache:
            cache.take(part)
        current.clear()

    @contextmanager
    def of_step(number: int) -> Iterator[None]:
        if cache:
            ids, mask, _ = fed[number]
            cache.set_length(mask.shape[1] - ids.shape[1])
        if routers:
            routers.begin(first + number)
        with routers or nullcontext():
            yield
        if cache and current:
            cache.step(current[0])

    with limited_steps(model):
        outputs = through(model, batches, of_block, of_step, listener)
        for number, ((_ids, mask, _), output) in enumerate(zip(fed, outputs, strict=True)):
            logits: F32 = output.logits.float().cpu().numpy()
            real: BOOL = mask.astype(bool)
            kept = (cache.after(number, mask.shape[1]), real) if cache else ((), real[:, :0])
            yield logits[:, -1] if number else logits[real], repeat(kept).__next__


def _batch(model: torch.nn.Module, fed: tuple[I64, I64, I64], cache: _Cache | None) -> dict[str, Any]:
    ids, mask, positions = (torch.from_numpy(array).to(device_of(model)) for array in fed)
    batch = {"input_ids": ids, "attention_mask": mask, **accepted_arguments(model, position_ids=positions)}
    return batch | ({"use_cache": True, cache_argument(model): cache.of_model} if cache else {})


class _Cache:
    """The cache of a model for ``rows`` rows whose blocks are run one after the other, with all steps each.

    ``kv_layers`` are the layers whose keys and values are kept.
    """

    def __init__(self, model: torch.nn.Module, rows: int, kv_layers: tuple[int, ...]) -> None:
        facts = dummy_run(model)
        self._blocks, self.kv_layers = facts.cache, kv_layers
        self._taken: dict[int, Entry] = {}
        self._states: dict[int, list[Entry]] = {}
        self._empty = [block.empty(weights_like(model), rows) for block in facts.cache]
        layers = [cache_layer(*block, 0) for block in zip(facts.cache, self._empty, strict=True)]
        self.of_model = cache_with(layers, facts.cache_class)

    def set_length(self, length: int) -> None:
        """Tell every layer how many tokens came before."""
        for layer in self.of_model.layers:
            layer.past_length = length

    def step(self, part: Segment) -> None:
        """Keep the states of ``part`` as a step has left them, which the next one overwrites."""
        for index in part:
            _, states = self._parts(index)
            self._states.setdefault(index, []).append(tuple(state.float().cpu().clone() for state in states))

    def take(self, part: Segment) -> None:
        """Keep the keys and values that ``part`` has left after the last step, and free them on the device."""
        for index in part:
            if index in self.kv_layers:
                self._taken[index] = tuple(side.float().cpu() for side in self._parts(index)[0])
            if self._blocks[index].kv:
                layer = self.of_model.layers[index]
                layer.keys, layer.values = self._empty[index][:2]

    def _parts(self, index: int) -> tuple[Entry, Entry]:
        block = self._blocks[index]
        return block.parts(entry_in(self.of_model, index, block))

    def after(self, step: int, slots: int) -> list[KV]:
        """The cache after a ``step``, when it had so many ``slots``: each step appends one."""
        pairs = (self._taken[index] for index in self.kv_layers)
        states = (state for index in sorted(self._states) for state in self._states[index][step])
        return [
            *(tuple(side[:, :, :slots].numpy() for side in pair) for pair in pairs),
            *((state.numpy(),) for state in states),
        ]


def rounding_noise(
    model: torch.nn.Module, rows: Rows, plan: Plan | None = None, listener: Listener | None = None
) -> float:
    """Largest |Δlogit| of a prefill of ``rows`` when every embedding entry moves by its last bit, up or down.

    It is the scale below which no parity can be asked for. With a ``plan`` the model is linearized by it. A
    well-conditioned float32 model gives about 1e-4.
    """
    generator = torch.Generator().manual_seed(0)

    def disturb(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        return output * (1 + signs * 2 * _LAST_BIT)

    text, embeddings = Text(rows, 0, cached=False), model.get_input_embeddings()  # type: ignore[operator]
    exact = record_pytorch(model, plan, text, listener=listener)
    hook = embeddings.register_forward_hook(disturb)
    try:
        disturbed = record_pytorch(model, plan, text, listener=listener)
    finally:
        hook.remove()
    return float(np.abs(exact.batches[0][0].logits - disturbed.batches[0][0].logits).max())


class Judged(NamedTuple):
    """The ``parity`` of what was judged, and a sentence for each gate that fails.

    What is lost in the precision anyway: ``base`` by the unmodified model with quantized weights, ``own`` by PyTorch.
    """

    parity: Parity
    failures: list[str]
    base: Parity | None
    own: Parity | None
    routing: Routing | None


class Reference:
    """What ``model`` with ``plan`` gives for ``text``, by its own choices of experts or by those of a graph.

    What it is held against is in ``precision``; it is ``routed`` if its choices of experts are watched.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        plan: Plan | None,
        text: Text,
        precision: Precision,
        listener: Listener | None = None,
        routed: bool = False,
    ) -> None:
        self.model, self.plan, self.text, self.listener = model, plan, text, listener
        self.precision, self.gates = precision, gates_for(precision.gates)
        self.own = Routers(text.real()) if routed else None
        self.recorded = record_pytorch(model, plan, text, self.own, listener)

    def judge(
        self,
        found: Recorded,
        unmodified: Callable[[], Recorded] | None = None,
        as_it_runs: Callable[[], Recorded] | None = None,
    ) -> Judged:
        """The verdict on what was ``found``; on quantized weights beside what the ``unmodified`` model's cost.

        ``as_it_runs`` gives what is found without the rounding that ``found`` was emulated with: it must pass, too.
        """
        (expected, told), precision = self.like(found.choices), self.precision
        parity = compare(expected, found, self.gates)
        failures, base, own, half, unrounded = parity.failures(), None, None, None, None
        if as_it_runs:
            others = as_it_runs()
            reference, unrounded = self.like(others.choices)
            wrong = compare(reference, others, self.gates).failures()
            failures += [f"as onnxruntime runs it, {failure}" for failure in wrong]
        if precision.bits and unmodified:
            # What the quantization costs the unmodified model is not the rewrite's to answer for.
            routed, base_graph = self.own is not None, unmodified()
            original = Reference(self.model, None, self.text, precision, self.listener, routed)
            base = compare(original.like(base_graph.choices)[0], base_graph, self.gates)
            failures += parity.failures_against(base, "the unmodified model's own")
        elif not precision.bits and precision.name != "fp32":
            half = told and Routers(told.real, told.told)
            own = pytorch_in_precision(
                precision, self.model, self.plan, self.text, expected, half, self.listener
            )
            failures += parity.failures_against(own, OWN)
        routing = None
        # What integers move a score by is seen in the proof alone.
        if self.own and told and not precision.bits:
            by_rounding = moved_by_rounding(told, half)
            routing = routing_of(self.own, told, by_rounding)
            failures += routing_failures(routing)
            if unrounded:
                failures += routing_failures(routing_of(self.own, unrounded, by_rounding))
        return Judged(parity, failures, base, own, routing)

    def like(self, told: Choices | None) -> tuple[Recorded, Routers | None]:
        """What PyTorch gives with the choices that it is ``told``, and its routers; by its own, and None, if it has
        other routers.
        """
        if self.own is None or told is None:
            return self.recorded, None
        ours = [[None if a is None else a.own.shape for a in one] for one in self.own.passes]
        if ours != [[None if a is None else a.shape for a in one] for one in told]:
            return self.recorded, None
        routers = Routers(self.own.real, told)
        if not any(differing(own, taken) for own, taken in _pairs(self.own, told)):
            routers.passes = self.own.passes
            return self.recorded, routers
        return record_pytorch(self.model, self.plan, self.text, routers, self.listener), routers


def pytorch_in_precision(
    precision: Precision,
    model: torch.nn.Module,
    plan: Plan | None,
    text: Text,
    exact: Recorded,
    routers: Routers | None = None,
    listener: Listener | None = None,
) -> Parity:
    """The decoder ``model`` in ``precision``, with these ``routers``, against what itself gives, both by ``plan``."""
    half = in_precision(model, precision.gates)
    with resident(half, room(half)):
        found = record_pytorch(half, plan, text, routers, listener)
    return compare(exact, found, gates_for(precision.gates))


# experts -------------------------------------------------------------------------------------------


@contextmanager
def choices_as_outputs(path: Path) -> Iterator[tuple[Path, Watch | None]]:
    """The graph at ``path`` with the choices of its routers as outputs, which a stream is to watch.

    A graph without routers is itself, and nothing is watched.
    """
    model = load_routed(path)
    if not (found := routers(model)):
        yield path, None
        return
    model.graph.outputs.extend(node.outputs[1] for node in found)
    with scratch(model, follow_links(model) or path.parent) as changed:
        yield changed, Watch(tuple(places_of(node) for node in found))


def choices_of(path: Path, watch: Watch, text: Text) -> Choices:
    """What the graph at ``path``, whose passes were watched, has chosen for the tokens that are no padding."""
    real = text.real(left=not interface_of(load_graph(path)).in_place)
    return [
        [by_token(array, of_pass) for array in arrays]
        for arrays, of_pass in zip(watch.passes, real, strict=True)
    ]


def _pairs(own: Routers, told: Sequence[Sequence[I64 | None]]) -> Iterator[tuple[I64, I64]]:
    for theirs, ours in zip(own.passes, told, strict=True):
        for choice, taken in zip(theirs, ours, strict=True):
            if choice is not None and taken is not None:
                yield choice.own, taken


def moved_by_rounding(told: Routers, half: Routers | None) -> list[float]:
    """How far half precision moves a score of each router, the choices being the same."""
    if half is None:
        return []
    return [
        max(moved(a.scores, b.scores) for a, b in zip(exact, rounded, strict=True) if a and b)
        for exact, rounded in zip(zip(*told.passes, strict=True), zip(*half.passes, strict=True), strict=True)
    ]


def routing_of(own: Routers, told: Routers, by_rounding: Sequence[float]) -> Routing:
    """A graph's choices, which PyTorch was ``told``, beside its ``own``.

    A choice is judged by the scores that PyTorch computes having been told all choices before it. ``by_rounding`` is
    how far rounding moves a score of each router; nothing for float32.
    """
    assert told.told is not None
    pairs = list(_pairs(own, told.told))
    worst = 0.0
    for number in range(len(told.passes[0])):
        short, size = 0.0, 0.0
        for choices, taken in zip(told.passes, told.told, strict=True):
            choice, places = choices[number], taken[number]
            if choice is None or places is None:
                continue
            short = max(short, float(shortfall(choice.scores, places).max(initial=0.0)))
            known = choice.scores[np.isfinite(choice.scores)]
            size = max(size, float(np.sqrt(np.mean(known**2))) if known.size else 0.0)
        allowed = max(_ROOM * by_rounding[number] if by_rounding else 0.0, _FLOAT32 * size)
        worst = max(worst, short / allowed if allowed else 0.0)
    return Routing(sum(len(a) for a, _ in pairs), sum(differing(*pair) for pair in pairs), worst)


def routing_failures(found: Routing) -> list[str]:
    """A sentence if a choice of the graph is none that rounding explains."""
    said = f"experts whose scores fall short by {found.worst:.3g} times what rounding explains"
    return [f"the graph sends a token to {said}"] if found.worst > 1 else []
