"""Run the model over calibration tokens or images, block by block, and collect the moments of its attention layers.

1. All rows go through a block in batches before the next block begins (:mod:`nbl_export.models.walk`). Forward hooks on
   the block's attention read h, x and y; the model is not changed. Where spans are asked for, rows go on from each
   block through those of its longest span, and the moments of all spans that begin with it are collected.
2. Memory is the weights of one block (of those of a span, where there are some), the accumulators of what begins with
   it, and the states between two blocks.
3. Of several processes, each takes its share of the batches, and the sums of a layer are added up when all have passed.
   Batches are the same for any number of processes; the sums differ in the order of additions in float64 only.
4. The moments of a layer are stored when all rows have passed it. A checkpoint is written only between two batches: the
   states, and the sums of the layer that is not finished. Batches and their order depend only on the tokens: a
   resumed run gives the same sums, bit for bit. Several processes keep their states between two blocks
   (:mod:`.rank_states`), and any number of processes goes on from them.
5. The first Ctrl-C (or SIGTERM) finishes the batch, writes a checkpoint and stops; the second stops at once,
   and the last checkpoint remains.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.blocks import ATTENTION, Block, Span, described, layer_of
from nbl_export.calibrate.moments import (
    ARRAYS,
    Accumulator,
    LayerMoments,
    Moments,
    digest_of_tokens,
)
from nbl_export.calibrate.states import OnDisk, RankStates, as_array, as_tensor, states_for
from nbl_export.calibrate.store import InMemory, Store
from nbl_export.checkpoint import saving_to
from nbl_export.errors import CalibrationError, InputError
from nbl_export.files import parse_json
from nbl_export.models.candidates import block_modules, choices, observing
from nbl_export.models.device import as_setting
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import hidden_size, main_input
from nbl_export.models.walk import Step, segments, walking
from nbl_export.models.weights import device_of, dtype_of, weights_like
from nbl_export.progress import Listener, Silent
from nbl_export.ranks import ALONE, Ranks
from nbl_export.tensorfile import open_tensors, save_tensors

if TYPE_CHECKING:
    import torch

# About this many tokens per forward pass: enough for the full GEMM rate, small enough for the CPU caches.
_BATCH_TOKENS = 1024
_STATES = "nbl-export/states/1"


def collect_moments(
    model: torch.nn.Module,
    tokens: NDArray[Any],
    listener: Listener | None = None,
    parts: Collection[str] = (ATTENTION,),
) -> Moments:
    """The moments of every candidate of ``model`` over ``tokens``, in memory: :func:`store_moments`."""
    store = InMemory()
    store_moments(model, tokens, "", store, listener, parts=parts)
    return Moments(store.layers)


def store_moments(
    model: torch.nn.Module,
    tokens: NDArray[Any],
    fingerprint: str,
    store: Store,
    listener: Listener | None = None,
    ranks: Ranks = ALONE,
    memory: int | None = None,
    parts: Collection[str] = (ATTENTION,),
) -> None:
    """Put the moments of every candidate of ``model`` into ``store``, a layer at a time.

    ``parts`` are those of its attentions, its MLPs, its spans, or several of them.

    Of several ``ranks``, the first stores the moments and reports the progress of all; all have the same ``tokens``.

    ``tokens`` are token ids [samples, seq_len] int32, or images [samples, channels, height, width] float32; each image
    counts as the number of tokens the model makes of it. ``memory`` are the bytes that states may take, by default half
    of what is free; what takes more is kept in files.

    ``fingerprint`` identifies the model and whatever else the moments are of; a checkpoint of another one, of another
    dtype or text is ignored. Raises
    :class:`CalibrationError` naming the layer if an activation is NaN or infinite, and ``KeyboardInterrupt`` after
    an interrupt, with its work saved.
    """
    import torch

    listener = listener or Silent()
    work = _Work(model, tokens, fingerprint, store, ranks, memory, parts)
    if not work.parts:
        return
    begun = work.resume(listener)
    total, done = (count * work.tokens for count in (len(work.parts), begun))
    with (
        listener.task("Calibrating layer", total, "tokens", done + work.seen) as task,
        torch.inference_mode(),
        # Several processes have nothing to save between two batches, so that a signal ends them at once.
        saving_to(store.checkpoint, work.save) if ranks.count == 1 else nullcontext(lambda: None) as between,
        walking(model) as run,
    ):
        for number in range(begun, len(work.parts)):
            task.part(number + 1, len(work.parts))
            wanted = work.begin(number)
            with observing(model, run, work.parts[number], wanted, work.observe) as step:
                while work.batch < len(work.states):
                    before = work.seen
                    work.through(step)
                    task.advance(work.seen - before)
                    between()
            work.finish()
            work.keep_states()


class _Work:
    """What is done of a calibration: the part of the model, the batches that have passed it, and the states.

    A batch that has passed the part has its states after it, the others those before it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokens: NDArray[Any],
        fingerprint: str,
        store: Store,
        ranks: Ranks,
        memory: int | None,
        parts: Collection[str],
    ) -> None:
        self._model, self._rows, self._store, self._ranks = model, tokens, store, ranks
        self._blocks = choices(model, parts)
        self._identity = {"model": fingerprint, "dtype": dtype_of(model), "tokens": digest_of_tokens(tokens)}
        self._identity |= as_setting(device_of(model))
        store.begin(self._identity)
        self._stored = ranks.shared(lambda: {index for index in self._blocks if store.has(index)})
        left = [index for index in self._blocks if index not in self._stored]
        self.parts = [s for s in segments(model) if left and s.start <= layer_of(left[-1])]
        self._length = tokens.shape[1] if tokens.ndim == 2 else dummy_run(model).tokens
        self._step = max(1, _BATCH_TOKENS // self._length)
        # The first row of each batch that this process takes.
        self._starts = ranks.mine(range(0, len(tokens), self._step))
        like = weights_like(model)
        size = self._step * self._length * hidden_size(model) * like.element_size()
        scratch = store.scratch if ranks.count == 1 else None
        self.states = states_for(len(self._starts), size, like, scratch, memory)
        self._kept = RankStates(store.checkpoint, ranks, self._identity)
        self._part = self.batch = 0
        self._sums: dict[Block, Accumulator] = {}
        self._found: Mapping[str, NDArray[Any]] = {}

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return len(self._rows) * self._length

    @property
    def seen(self) -> int:
        """Tokens that have passed the part, as far as this process can tell: the others are about as far."""
        return min(self.batch * self._ranks.count * self._step, len(self._rows)) * self._length

    def begin(self, number: int) -> list[Block]:
        """Begin the part ``number``, or go on with it; returns what begins in it whose moments are wanted."""
        if number != self._part:
            self._part, self.batch, self._found = number, 0, {}
            self.states.turn()
            if self.states.on_disk and self._store.checkpoint and self._ranks.count == 1:
                self.save(
                    self._store.checkpoint.path
                )  # before the states that the last one names are overwritten
        wanted = self._wanted(number)
        d, device = hidden_size(self._model), device_of(self._model)
        self._sums = {index: Accumulator(d, device) for index in wanted}
        for index, sums in self._sums.items() if self._found and self.batch else ():
            n, *arrays = (self._found[f"{index}.{name}"] for name in ("n", *ARRAYS))
            sums.restore(LayerMoments(int(n[0]), *arrays))
        return wanted

    def _wanted(self, number: int) -> list[Block]:
        """What begins in the part ``number`` whose moments are not stored yet."""
        part = self.parts[number]
        inside = (index for index in self._blocks if part.start <= layer_of(index) < part.stop)
        return [index for index in inside if index not in self._stored]

    def observe(self, index: Block, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        self._sums[index].add(h, x, y)

    def through(self, step: Step) -> None:
        """Run the next batch through the part."""
        import torch

        first = self._starts[self.batch]
        rows = self._rows[first : first + self._step]
        kind = np.int64 if rows.ndim == 2 else np.float32
        name = main_input(self._model)
        tensor = torch.from_numpy(rows.astype(kind)).to(device_of(self._model))
        like = weights_like(self._model)  # not every model rounds pixels itself
        inputs = {name: tensor.to(like.dtype) if tensor.is_floating_point() else tensor}
        self.states.put(self.batch, step(inputs, self.states.get(self.batch)))
        for index in self._sums:
            if not self._sums[index].is_finite():
                named = "" if isinstance(index, Span) else f" ({block_modules(self._model, index).module})"
                raise CalibrationError(
                    f"The activations of {described(index)}{named} are NaN or infinite, first seen in the batch at "
                    f"calibration row {first}, so nothing can be fitted to them: check the model's weights, or use "
                    "--calibration-dtype float32."
                )
        self.batch += 1

    def finish(self) -> None:
        """Store the moments of the part, which all batches have passed."""
        for index, sums in self._sums.items():
            sums.add_up(self._ranks)
            if self._ranks.first:
                self._store.put(index, sums.result())
        self._sums = {}

    def keep_states(self) -> None:
        """Of several processes: keep the states before the next part, if there is one and a save is due."""

        def passed() -> dict[int, NDArray[Any]]:
            found = ((i, self.states.after(number)) for number, i in enumerate(self._numbers))
            return {i: as_array(states) for i, states in found if states is not None}

        if self._ranks.count > 1 and self._part + 1 < len(self.parts):
            self._kept.save(self._part + 1, None if self.states.on_disk else passed)

    @property
    def _numbers(self) -> Sequence[int]:
        """The number of each batch of this process, among those of all."""
        return [start // self._step for start in self._starts]

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        tensors: dict[str, Any] = self.states.tensors()
        for index, sums in self._sums.items():
            layer = sums.result()
            tensors[f"{index}.n"] = np.array([layer.n])
            tensors |= {f"{index}.{name}": getattr(layer, name) for name in ARRAYS}
        path.parent.mkdir(exist_ok=True)
        about = {**self._identity, "part": self._part, "batch": self.batch, **self.states.about()}
        save_tensors(path, _STATES, tensors, {"nbl": json.dumps(about, sort_keys=True)})

    def resume(self, listener: Listener) -> int:
        """Go on from the checkpoint, if there is one of the same work; returns the number of the part to begin with."""
        checkpoint = self._store.checkpoint
        if self._ranks.count > 1 or checkpoint is None or not checkpoint.path.exists():
            return self._resume_between(listener)
        try:
            found, header = open_tensors(checkpoint.path, _STATES, "")
            about = parse_json(header["nbl"])
            part, batch = int(about.pop("part")), int(about.pop("batch"))
            files = {name: about.pop(name) for name in ("side", "files") if name in about}
            missing = min(layer_of(index) for index in self._blocks if index not in self._stored)
            if about != self._identity or part >= len(self.parts) or missing < self.parts[part].start:
                return 0
            self._adopt(found, files, part, batch)
        except (InputError, OSError, ValueError):
            listener.note(f"The checkpoint {checkpoint.path.name} is damaged and was ignored.")
            return 0
        self._part, self.batch, self._found = part, batch, found
        listener.note(
            f"Calibration goes on from a checkpoint in block {self.parts[part].start}, at row "
            f"{min(batch * self._step, len(self._rows))}."
        )
        return part

    def _resume_between(self, listener: Listener) -> int:
        """Go on from what several processes have kept between two parts; returns the number of the part."""
        missing = min(layer_of(index) for index in self._blocks if index not in self._stored)
        found = self._kept.find(-(-len(self._rows) // self._step))
        if found is None or found[0] >= len(self.parts) or missing < self.parts[found[0]].start:
            return 0
        part, files = found
        arrays: dict[int, NDArray[Any]] = {}

        def load() -> None:
            arrays.update(self._kept.load(files, self._numbers))

        try:
            self._ranks.each(load)
        except InputError:  # or not every machine has them
            listener.note("The states that were kept between two blocks are damaged and were ignored.")
            return 0
        for number, array in enumerate(arrays.values()):
            self.states.put(number, as_tensor(array, weights_like(self._model)), passed=False)
        self._part = part
        listener.note(f"Calibration goes on at block {self.parts[part].start}, from the states before it.")
        return part

    def _adopt(
        self, found: Mapping[str, NDArray[Any]], files: Mapping[str, Any], part: int, batch: int
    ) -> None:
        """Take the states of a checkpoint; raises an error if files of theirs are not as it says."""
        count, like = len(self.states), weights_like(self._model)
        disk = OnDisk(self._store.scratch, count, like)
        if files:
            disk.adopt(files)
            if self.states.on_disk:
                self.states = disk
                return
        for number in range(count):
            if files:
                states = disk.after(number) if number < batch else disk.get(number)
            else:
                array = found.get(f"states.{number}")
                states = None if array is None else as_tensor(array, like)
            if (
                states is not None
            ):  # before the first part there are none, but of the batches that have passed it
                self.states.put(number, states, number < batch)
