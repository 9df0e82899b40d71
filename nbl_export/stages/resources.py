"""`nbl-export plan-resources`: what each stage of a run would take on this machine, before anything is done.

Only the configuration and the headers of the weight files are read. Memory, operations and bytes are computed
(:mod:`.needs`, :mod:`.room`); the rates with which they become seconds are measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.blocks import ATTENTION, MLP, SPAN, Block, Mlp, spans_of
from nbl_export.settings import RunSettings
from nbl_export.stages.needs import GIB, MIB, Need, Sizes, needs, sizes_of

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


@dataclass(frozen=True)
class Estimate:
    """What the stages of a run need, by the model's ``sizes`` and what is ``asked``, which is resolved.

    The model computes in ``dtype``, of ``width`` bytes a number.
    """

    sizes: Sizes
    asked: RunSettings
    machine: Machine
    dtype: str
    width: int

    @property
    def needs(self) -> list[Need]:
        return needs(self.sizes, self.asked, self.width)

    @property
    def speed(self) -> str:
        """The rates that times are estimated with."""
        r = self.machine.rates
        return (
            f"Time at {r.fast / 1e9:,.0f} GFLOP/s in {self.dtype}, {r.exact / 1e9:,.0f} in float64, and "
            f"{r.read / 1e9:.1f} GB/s from the disk, as measured now; {size(self.machine.memory)} of memory are free. "
            "Timing the graphs comes on top."
        )


def estimated(found: ModelSource, asked: RunSettings) -> Estimate:
    """What a run of the model that was ``found`` needs on this machine, whose rates are measured for a second or two.

    No weight is read. Raises :class:`InputError` for layers that the model cannot have.
    """
    import psutil
    import torch

    from nbl_export.linearize.scores import check_selection
    from nbl_export.models.device import find_device
    from nbl_export.models.layers import hidden_size
    from nbl_export.models.load import fast_dtype, load_skeleton
    from nbl_export.models.tasks import task_named
    from nbl_export.stages.machine import rates

    resolved = asked.resolve(task_named(found.task))
    device = find_device(asked.calibration.device)
    name = fast_dtype(device) if asked.calibration.dtype == "auto" else asked.calibration.dtype
    dtype = getattr(torch, name)
    model = load_skeleton(found)
    check_selection(resolved.selection, _can_go(model, asked.calibration.parts), hidden_size(model))
    sizes, file = model_sizes(found, model)
    machine = Machine(psutil.virtual_memory().available, rates(dtype, device, file))
    if resolved.calibration.memory is None:
        half = replace(resolved.calibration, memory=f"{machine.memory / 2e6:.3f}MB")
        resolved = replace(resolved, calibration=half)
    return Estimate(sizes, resolved, machine, name, dtype.itemsize)


def _can_go(model: torch.nn.Module, parts: Collection[str]) -> list[Block]:
    """What can become linear of a ``model`` without weights, as far as that shows: its modules, not what they do."""
    from nbl_export.models.candidates import shared_without_numbers
    from nbl_export.models.layers import attention_layers
    from nbl_export.models.mlps import MlpPaths, mlp_paths

    lenders = set(shared_without_numbers(model).values())
    attentions = [layer.index for layer in attention_layers(model) if layer.index not in lenders]
    mlps = [index for index, found in mlp_paths(model).items() if isinstance(found, MlpPaths)]
    every: dict[str, Iterable[Block]] = {
        ATTENTION: attentions,
        MLP: map(Mlp, mlps),
        SPAN: spans_of({*attentions} & {*mlps}),
    }
    return sorted(block for part in parts for block in every[part])


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
    whole = sum(f.stat().st_size for f in files)
    return sizes_of(model, dtype.itemsize if dtype else 4, whole), max(files, key=lambda f: f.stat().st_size)


def lacks_memory(estimate: Estimate, stages: Collection[str] | None = None) -> Iterator[str]:
    """A sentence for each stage whose memory is not there, of all or of these ``stages``."""
    memory, width = estimate.machine.memory, estimate.width
    for need in estimate.needs:
        if need.memory <= memory or (stages is not None and need.stage not in stages):
            continue
        others = (
            (words, {n.stage: n.memory for n in needs(estimate.sizes, other, width)})
            for words, other in _smaller(estimate.asked)
        )
        fits = next((words for words, found in others if found[need.stage] <= memory), None)
        advice = f"with {fits} it would fit" if fits else "use a machine with more memory, or a smaller model"
        yield (
            f"`{need.stage}` needs about {size(need.memory)} of memory, most of it for {need.most}, and "
            f"{size(memory)} are free: {advice}."
        )


def place_of(out: Path) -> Path:
    """The output folder ``out``, or where it would be made: what has room on its disk."""
    return out if (out / "nbl").is_dir() else next(p for p in (out, *out.absolute().parents) if p.is_dir())


def _smaller(asked: RunSettings) -> Iterator[tuple[str, RunSettings]]:
    """Other settings that take less memory, in words."""
    selection, text, exporting = asked.selection, asked.calibration, asked.exporting
    yield "--criterion cca", replace(asked, selection=replace(selection, criterion="cca"))
    for rows_ in (text.samples // 4, text.samples // 16):
        if rows_:
            yield f"--samples {rows_}", replace(asked, calibration=replace(text, samples=rows_))
    if exporting.precision == "fp32":
        yield "--precision bf16", replace(asked, exporting=replace(exporting, precision="bf16"))


def size(count: float) -> str:
    """Bytes: 12 MiB, 1.5 GiB."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / MIB:,.0f} MiB"


def in_words(seconds: float) -> str:
    """3 s, 12 min, 2.0 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
