"""Run PyTorch on the rows of parity, also a model that does not stay in memory; in half precision, too, and disturbed.

Such a model is read once, and not in every step: the tokens of the decode steps are known, so all steps go through a
block before the next block is read, each with the cache that the steps before it have left there:

    block i in memory ─► prefill ─► cache of i ─► step 1 ─► cache of i ─► step 2 ─► … ─► block i + 1

The model's own code runs with the same cache as in a stream.

On texts with images and sounds, a graph that reads embeddings is given theirs among those of its tokens. PyTorch and
the graph run the same rows of held-out text, each by itself, up to a while after their first one. The graph attends to
earlier tokens only; so does PyTorch here, also where a model lets the tokens of an image see each other both ways.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbl_export.batch.arrays import BOOL, F32, FIRST, I64, are_media
from nbl_export.batch.rows import left_padded, one_more
from nbl_export.graph.precision import Precision
from nbl_export.linearize.swap import ORIGINAL, Version, linearized, sweep, version_of, within
from nbl_export.models.attention import Routers
from nbl_export.models.dummy_run import Entry, cache_shapes, dummy_run
from nbl_export.models.forward import cache_layer, cache_with, entry_in, limited_steps
from nbl_export.models.running import accepted_arguments, cache_argument
from nbl_export.models.walk import Segment, through
from nbl_export.models.weights import device_of, in_precision, resident, room, streams, weights_like
from nbl_export.progress import Listener
from nbl_export.runtime.stream import KV
from nbl_export.runtime.torch import torch_stream
from nbl_export.verify.parity.compare import (
    LAST,
    Pass,
    Recorded,
    Rows,
    compare,
    compare_vectors,
    record,
    record_passes,
)
from nbl_export.verify.parity.figures import Gates, Parity, StepParity, gates_for

if TYPE_CHECKING:
    from nbl_export.linearize.plan import Plan
from dataclasses import replace
from pathlib import Path

from numpy.typing import NDArray

from nbl_export.batch.names import EMBEDDINGS, POSITIONS
from nbl_export.models.media_tokens import MediaTokens, seeing
from nbl_export.runtime.ort import OrtModel

if TYPE_CHECKING:
    import torch

    from nbl_export.linearize.plan import Plan

_TITLE = "Running PyTorch"
OWN = "PyTorch's own in this precision"
_LAST_BIT = 2.0**-24  # relative, half a unit in the last place of float32


def record_pytorch(
    model: torch.nn.Module,
    plan: Plan | None,
    rows: Rows,
    decode_steps: int,
    cached: bool = True,
    alone: Rows = (),
    routers: Routers | None = None,
    listener: Listener | None = None,
) -> Recorded:
    """What ``model``, with ``plan`` if there is one, gives for ``rows``, as :func:`.record` does it.

    The ``routers`` of a mixture of experts are those of all passes, in their order.
    """
    if streams(model):
        version = version_of(model, plan) if plan else ORIGINAL
        layers = tuple(i for i in cache_shapes(model) if i not in version.layers) if cached else None
        starts = count(0, decode_steps + 1)

        def passes(batch: Rows) -> Iterator[Pass]:
            fed = list(_fed(batch, decode_steps, cached))
            return _by_blocks(model, version, fed, layers, routers, next(starts), plan, listener)

        return record_passes(passes, layers, rows, decode_steps, listener, alone, _TITLE)
    with linearized(model, plan) if plan else nullcontext():
        stream = torch_stream(model, plan.linear_attention if plan else (), cached)
        if routers is None:
            return record(stream, rows, decode_steps, listener, alone, _TITLE)
        hook = model.register_forward_pre_hook(lambda *_: routers.begin())
        try:
            with routers:
                return record(stream, rows, decode_steps, listener, alone, _TITLE)
        finally:
            hook.remove()


def _by_blocks(
    model: torch.nn.Module,
    version: Version,
    fed: Sequence[tuple[I64, I64, I64]],
    kv_layers: tuple[int, ...] | None,
    routers: Routers | None,
    first: int,
    plan: Plan | None,
    listener: Listener | None,
) -> Iterator[Pass]:
    """The passes over what is ``fed``; ``first`` is the number of the first one, as ``routers`` count."""
    cache = None if kv_layers is None else _Cache(model, len(fed[0][0]), kv_layers)
    batches = [_batch(model, one, cache) for one in fed]
    current: list[Segment] = []  # none once the head is run

    @contextmanager
    def of_block(part: Segment) -> Iterator[None]:
        current[:] = [part]
        with within(model, version, part, plan.fit_input) if plan else nullcontext():
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


def _fed(rows: Rows, decode_steps: int, cached: bool) -> Iterator[tuple[I64, I64, I64]]:
    """Ids, mask and positions of the prefill and of each step; without a cache a step has all tokens so far."""
    ids, mask, positions = left_padded([row[: len(row) - decode_steps] for row in rows])
    yield ids, mask, positions
    for step in range(1, decode_steps + 1):
        if not cached:
            yield left_padded([row[: len(row) - decode_steps + step] for row in rows])
            continue
        taught = [int(row[step - decode_steps - 1]) for row in rows]
        ids, mask, positions = one_more(taught, mask, positions)
        yield ids, mask, positions


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
        for index in range(part.start, part.stop):
            _, states = self._parts(index)
            self._states.setdefault(index, []).append(tuple(state.float().cpu().clone() for state in states))

    def take(self, part: Segment) -> None:
        """Keep the keys and values that ``part`` has left after the last step, and free them on the device."""
        for index in range(part.start, part.stop):
            if index in self.kv_layers:
                pair, _ = self._parts(index)
                self._taken[index] = tuple(side.float().cpu() for side in pair)
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


# what anyone loses ---------------------------------------------------------------------------------


def pytorch_in_precision(
    precision: Precision,
    model: torch.nn.Module,
    plan: Plan,
    rows: Rows,
    steps: int,
    cached: bool = True,
    exact: Recorded | None = None,
    alone: Rows = (),
    routers: Routers | None = None,
    listener: Listener | None = None,
) -> Parity:
    """The decoder ``model`` in ``precision`` against itself, both by ``plan``.

    ``exact`` is what the model itself gives, if it is known; ``routers`` are those of the half one's run.
    """
    exact = exact or record_pytorch(model, plan, rows, steps, cached, alone, listener=listener)
    half = in_precision(model, precision.gates)
    with resident(half, room(half)):
        found = record_pytorch(half, plan, rows, steps, cached, alone, routers, listener)
    return compare(exact, found, gates_for(precision.gates))


def rounding_noise(
    model: torch.nn.Module,
    rows: Rows,
    plan: Plan | None = None,
    seed: int = 0,
    listener: Listener | None = None,
) -> float:
    """Largest |Δlogit| of a prefill of ``rows`` when every embedding entry moves by its last bit.

    It is the scale below which no parity can be asked for. The signs are random for ``seed``; with a ``plan`` the model
    is linearized by it. A well-conditioned float32 model gives about 1e-4.
    """
    exact = record_pytorch(model, plan, rows, 0, cached=False, listener=listener)
    with _disturbed(model, seed):
        disturbed = record_pytorch(model, plan, rows, 0, cached=False, listener=listener)
    return float(np.abs(exact.batches[0][0].logits - disturbed.batches[0][0].logits).max())


@contextmanager
def _disturbed(model: torch.nn.Module, seed: int) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)

    def disturb(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        return output * (1 + signs * 2 * _LAST_BIT)

    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    hook = embeddings.register_forward_hook(disturb)
    try:
        yield
    finally:
        hook.remove()


# images and sounds ---------------------------------------------------------------------------------


I32 = NDArray[np.int32]
_ROWS, _AFTER = 2, 32  # rows that are compared, and how many tokens after the first image of each


def rows_with_media(heldout: I32) -> list[I32]:
    """The first rows of ``heldout`` that have images or sounds, each up to a while after its first one."""
    found = []
    for row in heldout:
        there = np.flatnonzero(are_media(row))
        if len(there):
            after = there[0] + int(np.argmin(np.append(are_media(row[there[0] :]), False)))
            found.append(row[: after + _AFTER])
    return found[:_ROWS]


def media_parity(
    model: torch.nn.Module,
    plan: Plan | None,
    graph: Path,
    rows: Sequence[I32],
    media: MediaTokens,
    gates: Gates,
    listener: Listener | None = None,
) -> Parity:
    """The last logits of each of ``rows`` by the ``graph`` against ``model`` with ``plan``, a step each."""
    import torch

    causal = replace(media, both_ways=np.zeros(1, np.int32))
    ids = [torch.from_numpy(row.astype(np.int64)).to(device_of(model)) for row in rows]
    with seeing(model, causal):
        by_pytorch = _by_pytorch(model, plan, ids, listener)
        expected = [logits[-LAST:].float().cpu().numpy() for logits in by_pytorch]
    decoder, steps = OrtModel(graph, small=True), []
    for number, (row, reference) in enumerate(zip(rows, expected, strict=True)):
        figures = compare_vectors(reference, _by_graph(decoder, row, causal), gates.near_tie)
        steps.append(StepParity(**vars(figures), step=number))
    return Parity(tuple(map(len, rows)), tuple(steps), gates)


def _by_pytorch(
    model: torch.nn.Module, plan: Plan | None, rows: Sequence[torch.Tensor], listener: Listener | None
) -> Iterator[torch.Tensor]:
    import torch

    if streams(model):
        version = version_of(model, plan) if plan else ORIGINAL
        fit_input = plan.fit_input if plan else "normed"
        for _, _, logits in sweep(model, rows, [version], fit_input, listener=listener):
            yield logits
        return
    with torch.inference_mode(), linearized(model, plan) if plan else nullcontext():
        for row in rows:
            yield model(input_ids=row[None], use_cache=False).logits[0]


def _by_graph(decoder: OrtModel, row: I32, media: MediaTokens) -> F32:
    import torch

    ids = row.astype(np.int64)[None]
    there = are_media(ids)
    assert decoder.interface.embedding is not None
    index = np.where(there, ids - FIRST, 0)
    # The embeddings of each layer are those of other tokens.
    given = dict(decoder.interface.embedding(np.where(there, media.stand_in[index], ids)))
    given[EMBEDDINGS] = decoder.interface.embedding(np.where(there, 0, ids))[EMBEDDINGS]
    given[EMBEDDINGS][there] = media.features[index[there]]
    positions = media.positions(torch.from_numpy(ids)).numpy()
    inputs = {**given, POSITIONS: positions if len(positions) > 1 else positions[0]}
    logits: F32 = decoder.run(decoder.interface.row(inputs, decoder.cache_dtype)).logits
    return logits[0, -LAST:]
