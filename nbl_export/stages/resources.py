"""`nbl-export plan-resources`: what each stage of a run would take on this machine, before anything is done.

Only the configuration and the headers of the weight files are read. Memory, operations and bytes are computed
(:mod:`.needs`, :mod:`.room`); the rates with which they become seconds are measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.digests import Unread
from nbl_export.errors import InputError
from nbl_export.report.drawing import Table
from nbl_export.settings import RunSettings
from nbl_export.stages.needs import GIB, MIB, Need, Sizes, needs, sizes_of
from nbl_export.stages.room import check_run
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    import torch

    from nbl_export.models.source import ModelSource
    from nbl_export.stages.machine import Rates

COLUMNS = ("stage", "memory", "mostly", "disk left", "disk beside", "time")
# A command imports, looks at the model's files and builds it.
_STARTS = 8.0
# The share of the rate of large matrix products that a model's forward pass and the sums of moments have.
_EFFICIENCY = 0.7
# Bytes per second of what is in the system's memory already.
_CACHED = 4e9


@dataclass(frozen=True)
class Machine:
    """What there is of a machine: bytes of memory, and how fast it is."""

    memory: int
    rates: Rates

    def seconds(self, need: Need, file: int) -> float:
        """The time of a stage; ``file`` are the bytes of the weights, which are read from the disk at least once."""
        rates = self.rates
        computing = need.fast / rates.fast + need.exact / rates.exact
        first = min(need.read, file)
        again = need.read - first
        reading = first / rates.read + again / (rates.read if file > self.memory / 2 else _CACHED)
        # To convert a weight is a pass over memory on a core, as hashing is.
        hashing = (file if need.stage == "calibrate" else 0.0) + need.room.leaves + need.widened
        return (
            _STARTS
            + need.seconds
            + computing / _EFFICIENCY
            + reading
            + hashing / rates.hashed
            + need.room.writes / rates.read
        )


def planned(source: str, out: Path, asked: RunSettings, trust_remote_code: bool = False) -> list[Table]:
    """The table of a run of ``source`` as ``asked`` into ``out``; its problems are what does not fit."""
    import psutil
    import torch

    from nbl_export.linearize.scores import check_selection
    from nbl_export.models.candidates import shared_without_numbers
    from nbl_export.models.device import find_device
    from nbl_export.models.layers import attention_layers, hidden_size
    from nbl_export.models.load import fast_dtype, load_skeleton
    from nbl_export.models.source import find_model
    from nbl_export.models.tasks import task_named
    from nbl_export.stages.machine import rates

    found = find_model(source, trust_remote_code, Unread())
    device = find_device(asked.calibration.device)
    name = fast_dtype(device) if asked.calibration.dtype == "auto" else asked.calibration.dtype
    dtype = getattr(torch, name)
    model = load_skeleton(found)
    lenders = set(shared_without_numbers(model).values())
    can_go = [layer.index for layer in attention_layers(model) if layer.index not in lenders]
    check_selection(asked.selection, can_go, hidden_size(model))
    sizes, file = model_sizes(found, model)
    resolved = asked.resolve(task_named(found.task))
    machine = Machine(psutil.virtual_memory().available, rates(dtype, device, file))
    if resolved.calibration.memory is None:
        half = replace(resolved.calibration, memory=f"{machine.memory / 2e6:.3f}MB")
        resolved = replace(resolved, calibration=half)
    each = needs(sizes, resolved, dtype.itemsize)
    problems = tuple(misfits(sizes, resolved, dtype.itemsize, machine.memory, out))
    weights = sizes.shape.weights / 1e6
    title = f"{found.source}: {weights:,.{1 if weights < 10 else 0}f}M weights in {_size(sizes.file)}"
    return [Table(title, COLUMNS, rows(each, machine, sizes.file), _speed(machine, name), problems=problems)]


def model_sizes(source: ModelSource, model: torch.nn.Module | None = None) -> tuple[Sizes, Path]:
    """The sizes of a model by its configuration and headers, and its largest weight file.

    ``model`` is the model without weights, if it is there already.
    """
    from nbl_export.models.limits import weight_files
    from nbl_export.models.load import load_skeleton
    from nbl_export.models.stored import stored_tensors

    folder = Path(source.path)
    model = load_skeleton(source) if model is None else model
    if source.gguf_file:
        path = folder / source.gguf_file
        return sizes_of(model, 4, path.stat().st_size, computed=True), path
    files = weight_files(folder)
    dtype = stored_tensors(folder).dtype
    size = sum(f.stat().st_size for f in files)
    return sizes_of(model, dtype.itemsize if dtype else 4, size), max(files, key=lambda f: f.stat().st_size)


def rows(each: Sequence[Need], machine: Machine, file: int) -> tuple[tuple[str, ...], ...]:
    """A row for each stage."""
    return tuple(
        (
            need.stage,
            _size(need.memory),
            need.most,
            _size(need.room.leaves),
            _size(need.room.beside),
            in_words(machine.seconds(need, file)),
        )
        for need in each
    )


def misfits(sizes: Sizes, asked: RunSettings, width: int, memory: int, out: Path) -> Iterator[str]:
    """A sentence for each stage whose memory is not there, and one for the disk."""
    for need in needs(sizes, asked, width):
        if need.memory <= memory:
            continue
        others = (
            (words, {n.stage: n.memory for n in needs(sizes, other, width)})
            for words, other in _smaller(asked)
        )
        fits = next((words for words, found in others if found[need.stage] <= memory), None)
        advice = f"with {fits} it would fit" if fits else "use a machine with more memory, or a smaller model"
        yield (
            f"`{need.stage}` needs about {_size(need.memory)} of memory, most of it for {need.most}, and "
            f"{_size(memory)} are free: {advice}."
        )
    place = out if (out / "nbl").is_dir() else next(p for p in (out, *out.absolute().parents) if p.is_dir())
    try:
        check_run(Workspace(place), sizes.shape, asked)
    except InputError as error:
        yield str(error)


def _smaller(asked: RunSettings) -> Iterator[tuple[str, RunSettings]]:
    """Other settings that take less memory, in words."""
    selection, text, exporting = asked.selection, asked.calibration, asked.exporting
    yield "--criterion cca", replace(asked, selection=replace(selection, criterion="cca"))
    for rows_ in (text.samples // 4, text.samples // 16):
        if rows_:
            yield f"--samples {rows_}", replace(asked, calibration=replace(text, samples=rows_))
    if exporting.precision == "fp32":
        yield "--precision bf16", replace(asked, exporting=replace(exporting, precision="bf16"))


def _speed(machine: Machine, dtype: str) -> str:
    r = machine.rates
    return (
        f"Time at {r.fast / 1e9:,.0f} GFLOP/s in {dtype}, {r.exact / 1e9:,.0f} in float64, and {r.read / 1e9:.1f} GB/s "
        f"from the disk, as measured now; {_size(machine.memory)} of memory are free. Timing the graphs comes on top."
    )


def _size(size: float) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / MIB:,.0f} MiB"


def in_words(seconds: float) -> str:
    """3 s, 12 min, 2.0 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
