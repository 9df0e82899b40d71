"""Run the model over calibration tokens or images, block by block, and collect the moments of its attention layers.

1. All rows go through a block in batches before the next block begins (:mod:`nbl_export.models.walk`). Forward hooks on
   the block's attention read h, x and y; the model is not changed. Where spans are asked for, rows go on from each
   block through those of its longest span, and the moments of all spans that begin with it are collected.
2. Memory is the weights of one block (of those of a span, where there are some), the accumulators of what begins with
   it, and the states before and after it.
3. Of several processes, each takes its share of the batches, and the sums of a layer are added up when all have passed.
   Batches are the same for any number of processes; the sums differ in the order of additions in float64 only.
4. The moments of a layer are given when all rows have passed it. The states between two blocks are kept
   (:class:`States`): a run of any number of processes goes on from there, to the same bits where there is one.
5. The first Ctrl-C (or SIGTERM) finishes the batch, saves the states before the block and stops; the second stops at
   once.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.blocks import ATTENTION, Block, Span, described, layer_of
from nbl_export.calibrate.moments import Accumulator, LayerMoments, Moments, digest_of_tokens
from nbl_export.errors import CalibrationError, InputError, Interrupted
from nbl_export.models.candidates import block_modules, choices, observing
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import hidden_size, main_input
from nbl_export.models.load import as_setting
from nbl_export.models.walk import segments, walking
from nbl_export.models.weights import device_of, dtype_of, half_free, weights_like
from nbl_export.processes import deferred_interrupt
from nbl_export.progress import Listener, Silent
from nbl_export.ranks import ALONE, Ranks
from nbl_export.tensorfile import StoredTensors, open_tensors, save_tensors

# About this many tokens per forward pass: enough for the full GEMM rate, small enough for the CPU caches.
_BATCH_TOKENS = 1024
_FORMAT = "nbl-export/states/2"
_FILES = "states.*.safetensors"
# States after a part are kept beside those before it, from which an interrupted run goes on.
_SIDES = 2


def collect_moments(
    model: torch.nn.Module,
    tokens: NDArray[Any],
    listener: Listener | None = None,
    parts: Collection[str] = (ATTENTION,),
) -> Moments:
    """The moments of every candidate of ``model`` over ``tokens``, in memory: :func:`moments_of`."""
    return Moments(dict(moments_of(model, tokens, parts, listener)))


def identity_of(model: torch.nn.Module, tokens: NDArray[Any], fingerprint: str) -> dict[str, str]:
    """What moments are of: the ``fingerprint`` of the model and whatever else, the dtype, the device, the tokens."""
    found = {"model": fingerprint, "dtype": dtype_of(model), "tokens": digest_of_tokens(tokens)}
    return found | as_setting(device_of(model))


def moments_of(
    model: torch.nn.Module,
    tokens: NDArray[Any],
    parts: Collection[str] = (ATTENTION,),
    listener: Listener | None = None,
    *,
    task: str = "Calibrating layer",
    accumulator: Callable[..., Accumulator] = Accumulator,
    batch_rows: int | None = None,
    known: Callable[[Block], bool] = lambda _block: False,
    folder: Path | None = None,
    identity: Mapping[str, str] | None = None,
    every_seconds: float = 60.0,
    ranks: Ranks = ALONE,
    memory: int | None = None,
) -> Iterator[tuple[Block, LayerMoments]]:
    """Each candidate of ``model`` that is not ``known``, and its moments, when all rows have passed it.

    ``parts`` are those of its attentions, its MLPs, its spans, or several of them. ``tokens`` are token ids [samples,
    seq_len] int32, or images [samples, channels, height, width] float32; each image counts as the number of tokens the
    model makes of it. Of several ``ranks``, the first gives the moments and reports the progress of all; all have the
    same ``tokens``. ``memory`` are the bytes that states may take; ``folder``, ``identity`` and ``every_seconds`` are
    those of :class:`.States`.

    Raises :class:`CalibrationError` naming the layer if an activation is NaN or infinite, and ``KeyboardInterrupt``
    after an interrupt, with its work saved.
    """
    listener = listener or Silent()
    every = choices(model, parts)
    there = ranks.shared(lambda: {block for block in every if known(block)})
    if not (left := [block for block in every if block not in there]):
        return
    walked = [part for part in segments(model) if part.start <= layer_of(left[-1])]
    length = tokens.shape[1] if tokens.ndim == 2 else dummy_run(model).tokens
    rows = batch_rows or max(1, _BATCH_TOKENS // length)
    starts = range(0, len(tokens), rows)
    d, device = hidden_size(model), device_of(model)
    states = States(
        model,
        ranks.mine(range(len(starts))),
        rows * length * d,
        memory,
        folder,
        identity,
        ranks,
        every_seconds,
    )
    first = min(map(layer_of, left))
    try:
        if states.resume(len(starts), max(i for i, part in enumerate(walked) if part.start <= first)):
            listener.note(
                f"Calibration goes on at block {walked[states.part].start}, from the states before it."
            )
    except InputError:  # not every machine has them
        listener.note("The states that were kept between two blocks cannot be read and were ignored.")

    def passed(batches: int) -> int:
        # As far as this process can tell: the others are about as far.
        return min(batches * ranks.count * rows, len(tokens)) * length

    total, done = (count * len(tokens) * length for count in (len(walked), states.part))
    # Several processes save nothing within a block, so that a signal ends them at once.
    heard: AbstractContextManager[list[int]] = deferred_interrupt() if ranks.count == 1 else nullcontext([])
    with (
        listener.task(task, total, "tokens", done) as shown,
        torch.inference_mode(),
        heard as stop,
        walking(model) as run,
    ):
        for part in walked[states.part :]:
            shown.part(states.part + 1, len(walked))
            inside = [block for block in left if part.start <= layer_of(block) < part.stop]
            sums = accumulator(inside, d, device)
            with observing(model, run, part, inside, sums.add) as step:
                for count, number in enumerate(states.numbers):
                    batch = _inputs(model, tokens[starts[number] : starts[number] + rows])
                    states.put(number, step(batch, states.get(number)))
                    if (broken := sums.broken()) is not None:
                        span = isinstance(broken, Span)
                        module = "" if span else f" ({block_modules(model, broken).module})"
                        raise CalibrationError(
                            f"The activations of {described(broken)}{module} are NaN or infinite, first seen in the "
                            f"batch at calibration row {starts[number]}, so nothing can be fitted to them: check the "
                            "model's weights, or use --calibration-dtype float32."
                        )
                    shown.advance(passed(count + 1) - passed(count))
                    if stop:
                        states.save(now=True)
                        raise Interrupted(stop[0])
            yield from sums.results(ranks)
            states.turn()
            states.save()


def _inputs(model: torch.nn.Module, rows: NDArray[Any]) -> dict[str, torch.Tensor]:
    tensor = torch.from_numpy(rows.astype(np.int64 if rows.ndim == 2 else np.float32)).to(device_of(model))
    # Not every model rounds pixels itself.
    return {main_input(model): tensor.to(weights_like(model).dtype) if tensor.is_floating_point() else tensor}


# states between blocks ---------------------------------------------------------------------------


class States:
    """The states of batches before and after a part of ``model``: those with ``numbers``, of at most ``values`` each.

    They are in memory if ``limit`` bytes are enough for both sides of a part; without a limit that is half of what is
    free. Files lie in ``folder``, and are of this ``identity``; without one nothing is gone on from. States in files,
    and those saved from memory, are files of one form: any number of processes goes on from the latest part of which
    all batches have states, with any amount of memory. Raises :class:`InputError` for a limit that is less than what
    one batch takes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        numbers: Sequence[int],
        values: int,
        limit: int | None = None,
        folder: Path | None = None,
        identity: Mapping[str, str] | None = None,
        ranks: Ranks = ALONE,
        every_seconds: float = 60.0,
    ) -> None:
        self._like = weights_like(model)
        size = values * self._like.element_size()
        if limit is not None and limit < size:
            raise InputError(
                f"--memory {limit:,} bytes is less than the states of one batch of rows take: give "
                f"{-(-size // 1000):,}kB or more, or lower --seq-len."
            )
        self.numbers, self.part = numbers, 0
        self._folder, self._identity, self._ranks = folder, dict(identity or {}), ranks
        self._every_seconds, self._saved_at = every_seconds, time.monotonic()
        self.on_disk = _SIDES * len(numbers) * size > (half_free(model) if limit is None else limit)
        if self.on_disk and (folder is None or ranks.count > 1):  # a machine may not see the output folder
            self._own = tempfile.TemporaryDirectory(prefix="nbl-export.")
            folder = Path(self._own.name)
        self._place = folder
        self._before: dict[int, Any] = {}
        self._after: dict[int, Any] = {}

    def get(self, number: int) -> torch.Tensor | None:
        """The states of the batch before the part; None before the first part."""
        kept = self._before.get(number)
        return self._read(kept, number) if isinstance(kept, StoredTensors) else kept

    def put(self, number: int, states: torch.Tensor) -> None:
        """Keep the states of the batch after the part."""
        if self._folder is None:
            self._before.pop(number, None)
        self._after[number] = states
        if self.on_disk:
            self._after[number] = self._written(self.part + 1, str(number), {number: states})

    def turn(self) -> None:
        """The part is finished: what was after it is before the next one."""
        self._before, self._after, self.part = self._after, {}, self.part + 1
        if self.on_disk:
            self._forget()

    def save(self, now: bool = False) -> None:
        """Keep the states before the part if a save is due, or ``now``; not where a machine does not see the folder."""
        folder, late = self._folder, time.monotonic() - self._saved_at > self._every_seconds
        if folder is None or not self.part or not self._ranks.shared(lambda: late or now):
            return
        if all(self._ranks.each(lambda: not self.on_disk and folder.parent.is_dir())):
            name = f"{self._ranks.rank}-of-{self._ranks.count}"
            self._ranks.each(lambda: self._written(self.part, name, self._before))
            if self._ranks.first:
                self._forget()
            self._saved_at = time.monotonic()

    def resume(self, count: int, most: int) -> bool:
        """Go on at the latest part up to ``most`` of which all ``count`` batches have states, if there is one.

        Raises :class:`InputError` where a process cannot read them.
        """

        def find() -> tuple[int, dict[int, Path]]:
            found: dict[int, dict[int, Path]] = {}
            for path in self._folder.glob(_FILES) if self._folder else ():
                with suppress(InputError, ValueError):
                    files = found.setdefault(_part_of(path), {})
                    files.update((int(number), path) for number in self._opened(path))
            whole = [part for part, files in found.items() if len(files) == count and part <= most]
            return (max(whole), found[max(whole)]) if whole else (0, {})

        part, files = self._ranks.shared(find)
        mine = {number: files[number] for number in self.numbers if files}
        opened: dict[Path, StoredTensors] = {}
        self._ranks.each(lambda: opened.update((path, self._opened(path)) for path in set(mine.values())))
        for number, path in mine.items():
            self._before[number] = opened[path] if self.on_disk else self._read(opened[path], number)
        self.part = part
        return bool(files)

    def _written(self, part: int, name: str, states: Mapping[int, torch.Tensor]) -> StoredTensors:
        assert self._place is not None
        self._place.mkdir(exist_ok=True)
        # NumPy has no bfloat16: the bits of two bytes are kept as an integer.
        bits = ((n, s.view(torch.int16) if s.element_size() == 2 else s) for n, s in states.items())
        arrays = {str(number): state.cpu().numpy() for number, state in bits}
        path = self._place / f"states.{part:03}.{name}.safetensors"
        save_tensors(path, _FORMAT, arrays, {"nbl": self._about(part)})
        return StoredTensors(path, list(arrays))

    def _about(self, part: int) -> str:
        return json.dumps({**self._identity, "part": part}, sort_keys=True)

    def _opened(self, path: Path) -> StoredTensors:
        """The states of a file; raises :class:`InputError` if it is damaged, or of something else."""
        tensors, header = open_tensors(path, _FORMAT, "begin anew")
        if header.get("nbl") != self._about(_part_of(path)):
            raise InputError(f"{path} is of something else: begin anew.")
        return tensors

    def _read(self, stored: StoredTensors, number: int) -> torch.Tensor:
        tensor = torch.from_numpy(stored[str(number)])
        return (tensor.view(self._like.dtype) if self._like.element_size() == 2 else tensor).to(
            self._like.device
        )

    def _forget(self) -> None:
        """Delete the states of other parts."""
        for path in self._place.glob(_FILES) if self._place else ():
            if _part_of(path) != self.part:
                path.unlink(missing_ok=True)


def _part_of(path: Path) -> int:
    return int(path.name.split(".")[1])
