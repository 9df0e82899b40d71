"""What each stage writes to the output folder, by what was asked, and whether the disk has room for it.

Sizes follow from the model's shape, so that a run that cannot end is refused before its first minute of work. Weights
and moments are exact; configurations, reports and the like are not counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.blocks import ATTENTION, MLP, SPAN, spans_of
from nbl_export.calibrate.moments import file_bytes
from nbl_export.errors import InputError
from nbl_export.settings import (
    CalibrateSettings,
    EngineSettings,
    ExportSettings,
    FolderSettings,
    RunSettings,
    SelectSettings,
)
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    import torch

# Bytes of a weight in a graph; quantized ones with their scales. Their embedding stays float32.
WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.25, "int4": 0.75}
_QUANTIZED = ("int8", "int4")
# Rows of the probe have about so many tokens in all; each layer has u and y of them, and the residual stream.
_PROBE_TOKENS = 40
_FLOAT = 4
# The weights of a part of a graph that is run in parts, but for a larger one.
_PART = 128 << 20


@dataclass(frozen=True)
class Shape:
    """What the sizes depend on: weights (those of the ``embedding`` are among them), width, and what can become linear.

    These are attention ``layers`` and, where they are asked for, ``mlps``: all together ``blocks``. ``row_bytes`` and
    ``row_tokens`` are those of an image; None for text, whose rows are as long as was asked.
    """

    weights: int
    embedding: int
    width: int
    layers: int
    row_bytes: int | None = None
    row_tokens: int | None = None
    mlps: int = 0
    parts: tuple[str, ...] = (ATTENTION,)

    @property
    def blocks(self) -> int:
        whole = min(self.layers, self.mlps)
        of = {ATTENTION: self.layers, MLP: self.mlps, SPAN: len(spans_of(range(whole)))}
        return sum(of[part] for part in self.parts)

    @property
    def probed(self) -> int:
        """The attentions and MLPs among them; a span has no tensors of its own."""
        return replace(self, parts=tuple(part for part in self.parts if part != SPAN)).blocks

    @classmethod
    def of(cls, model: torch.nn.Module, row_tokens: int | None = None, layers: int | None = None) -> Shape:
        """The shape of ``model``, whose weights are not read, but for how many tokens an image has, and how many
        ``layers`` can go, if these are not given.
        """
        from math import prod

        from nbl_export.batch.names import PIXELS
        from nbl_export.models.candidates import candidates
        from nbl_export.models.dummy_run import dummy_run
        from nbl_export.models.layers import hidden_size, image_shape, main_input
        from nbl_export.models.mlps import MlpPaths, mlp_paths

        images = main_input(model) == PIXELS
        table = None if images else model.get_input_embeddings()  # type: ignore[operator]
        return cls(
            weights=sum(p.numel() for p in model.parameters()),
            embedding=0 if table is None else table.weight.numel(),
            width=hidden_size(model),
            layers=len(candidates(model)) if layers is None else layers,
            row_bytes=_FLOAT * prod(image_shape(model)) if images else None,
            row_tokens=(row_tokens or dummy_run(model).tokens) if images else None,
            mlps=sum(isinstance(found, MlpPaths) for found in mlp_paths(model).values()),
        )


@dataclass(frozen=True)
class Room:
    """The bytes that a stage leaves in the output folder, and those that it needs beside them while it works."""

    stage: str
    leaves: int
    beside: int = 0

    @property
    def writes(self) -> int:
        return self.leaves + self.beside


def rooms(shape: Shape, asked: RunSettings) -> list[Room]:
    """The room of each stage of a run, in order; ``asked`` is resolved. What other stages write is small."""
    selection, exporting = asked.selection, asked.exporting
    shape = replace(shape, parts=asked.calibration.parts)
    found = [room_to_calibrate(shape, asked.calibration)]
    made = [room_to_select(shape, selection), room_to_export(shape, exporting)]
    found += reversed(made) if selection.budget or selection.workload else made
    found.append(room_to_rewrite(shape, selection, exporting, not asked.folder.keeps))
    return [*found, room_to_build(shape, asked.engines, exporting)] if asked.engines else found


def room_to_calibrate(shape: Shape, settings: CalibrateSettings) -> Room:
    """Rows, moments and probe; beside them two checkpoints, the new one and the old one: the states of all rows."""
    shape = replace(shape, parts=settings.parts)
    rows = settings.samples + settings.heldout_samples + settings.selection_samples
    row = shape.row_bytes or _FLOAT * settings.seq_len
    tokens = settings.samples * (shape.row_tokens or settings.seq_len)
    one = file_bytes(shape.width)
    probe = 3 * _FLOAT * _PROBE_TOKENS * shape.width * shape.probed
    states = _FLOAT * tokens * shape.width + 2 * one
    return Room("calibrate", rows * row + shape.blocks * one + probe, 2 * states)


def room_to_select(shape: Shape, settings: SelectSettings) -> Room:
    """W and b of the plan; beside them the state of a repair, or those of a graph that is timed."""
    probe = 2 * _FLOAT * _PROBE_TOKENS * shape.width * shape.probed
    maps = _FLOAT * map_weights(shape, settings)
    repair = 2 * 3 * maps if settings.repair else 0
    timed = maps if settings.budget.min_speedup is not None else 0
    return Room("select", maps + probe, max(repair, timed))


def room_to_export(shape: Shape, settings: ExportSettings) -> Room:
    """The weights in their precision; to measure ranges for fp16 those of a part are there in float32 first."""
    leaves = _graph_bytes(shape, settings)
    measures = settings.exported_by == "torch" and settings.precision == "fp16"
    part = min(_FLOAT * shape.weights, max(_FLOAT * shape.embedding, _PART)) if measures else 0
    return Room("export", leaves, max(0, part - leaves))


def room_to_rewrite(
    shape: Shape, selection: SelectSettings, settings: ExportSettings, whole: bool = False
) -> Room:
    """W and b; a ``whole`` graph has the other weights once more."""
    maps = int(map_weights(shape, selection) * WEIGHT_BYTES[str(settings.precision)])
    return Room("rewrite", maps + (_graph_bytes(shape, settings) if whole else 0))


def room_to_build(shape: Shape, _settings: EngineSettings, exporting: ExportSettings) -> Room:
    """An engine of each graph."""
    return Room("build", 2 * _graph_bytes(shape, exporting))


def _graph_bytes(shape: Shape, settings: ExportSettings) -> int:
    embedding = _FLOAT * shape.embedding if settings.precision in _QUANTIZED else 0
    return int(shape.weights * WEIGHT_BYTES[str(settings.precision)]) + embedding


def map_weights(shape: Shape, settings: SelectSettings) -> int:
    """Numbers of W and b of the chosen layers; where K is found out, of half of them."""
    k = len(settings.layers) if settings.layers is not None else settings.k
    one = shape.width * (shape.width if settings.rank is None else 2 * settings.rank) + shape.width
    return one * (-(-shape.blocks // 2) if k is None else k)


def needed(found: Sequence[Room], have: Mapping[str, int] | None = None) -> int:
    """The bytes that must be free before the first of these stages, which come one after the other.

    ``have`` are the bytes that a stage has in the folder and does not write again.
    """
    there = have or {}
    left, most = 0, 0
    for room in found:
        known = there.get(room.stage, 0)
        most = max(most, left + room.writes - known)
        left += max(0, room.leaves - known)
    return most


def check_room(
    ws: Workspace,
    found: Sequence[Room],
    others: Mapping[str, Sequence[Room]] | None = None,
    have: Mapping[str, int] | None = None,
) -> None:
    """Raise :class:`InputError` if the disk has no room for what these stages write.

    ``others`` are the rooms with another option, by its words: the first one that fits is named.
    """
    free, need = shutil.disk_usage(ws.root).free, needed(found, have)
    if need <= free:
        return
    fits = next((words for words, rooms in (others or {}).items() if needed(rooms, have) <= free), None)
    what = f"`{found[0].stage}`" if len(found) == 1 else "this run"
    advice = f"; with {fits} it would fit" if fits else ""
    raise InputError(
        f"{ws.root} has {_shown(free)} free, and {what} needs about {_shown(need)}: free some space or choose another "
        f"--output{advice}."
    )


def check_run(ws: Workspace, shape: Shape, asked: RunSettings, kept: Collection[str] = ()) -> None:
    """Raise :class:`InputError` if the disk has no room for all stages of the run, which goes on from what is there.

    The stages that are ``kept`` write nothing.
    """

    def written(asked: RunSettings) -> list[Room]:
        return [room for room in rooms(shape, asked) if room.stage not in kept]

    found = written(asked)
    others = {} if asked.folder.keeps else {"--keep-baseline yes": replace(asked, folder=FolderSettings())}
    others |= {words: replace(asked, exporting=e) for words, e in _narrower(asked.exporting)}
    have = {room.stage: _size_of(ws.paths(record)) for room in found if (record := ws.record(room.stage))}
    check_room(
        ws,
        found,
        {w: written(other) for w, other in others.items()},
        {"calibrate": _unfinished(ws), **have},
    )


def check_calibrate(ws: Workspace, shape: Shape, settings: CalibrateSettings) -> None:
    """Raise :class:`InputError` if the disk has no room for the moments."""
    check_room(ws, [room_to_calibrate(shape, settings)], have={"calibrate": _unfinished(ws)})


def check_export(ws: Workspace, shape: Shape, settings: ExportSettings) -> None:
    """Raise :class:`InputError` if the disk has no room for the graph."""
    others = {words: [room_to_export(shape, other)] for words, other in _narrower(settings)}
    check_room(ws, [room_to_export(shape, settings)], others)


def _narrower(settings: ExportSettings) -> Iterator[tuple[str, ExportSettings]]:
    """The other precisions of this exporter, the widest first, in which bf16 comes before fp16."""
    offered = sorted(settings.offered.precisions, key=lambda name: (-WEIGHT_BYTES[name], name))
    for name in offered:
        if name != settings.precision:
            yield f"--precision {name}", replace(settings, precision=name)


def _unfinished(ws: Workspace) -> int:
    """The bytes that an interrupted calibration has left to go on from."""
    return _size_of(ws.partial_moments.glob("*"))


def _size_of(files: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in files if path.is_file())


def _shown(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB" if size < 10 << 30 else f"{size / 2**30:,.1f} GiB"
