"""Run PyTorch on the rows of parity, also a model that does not stay in memory, and disturbed by rounding.

A model is read once, and not in every step: the tokens of the decode steps are known, so all steps go through a block
before the next block is read, each with the cache that the steps before it have left there:

    block i in memory ─► prefill ─► cache of i ─► step 1 ─► cache of i ─► step 2 ─► … ─► block i + 1

The model's own code runs with the same cache as in a stream, to the same bits; a small model takes the same path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import repeat
from typing import Any

import numpy as np
import torch

from nbl_export.batch.arrays import BOOL, F32, I64
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import ORIGINAL, Version, version_of, within
from nbl_export.models.attention import Routers
from nbl_export.models.dummy_run import Entry, cache_shapes, dummy_run
from nbl_export.models.forward import cache_layer, cache_with, entry_in, limited_steps
from nbl_export.models.running import accepted_arguments, cache_argument
from nbl_export.models.walk import Segment, through
from nbl_export.models.weights import device_of, weights_like
from nbl_export.progress import Listener
from nbl_export.runtime.stream import KV
from nbl_export.settings.choices import FitInput
from nbl_export.verify.parity.compare import Pass, Recorded, Rows, Text, record

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
