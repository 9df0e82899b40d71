"""The table of docs/large-models.md: what a run of 1.7B, 8B and 70B takes on three machines, computed.

    python scripts/resources_table.py

The sizes come from the shapes of the models, the memory and disk from the formulas of ``nbl-export plan-resources``
(nbl_export/stages/needs.py, room.py), the time from the rates in MACHINES, which are assumed and not measured here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from bench_scale import SHAPES, Shape

from nbl_export.models.tasks import task_named
from nbl_export.settings import CalibrateSettings, ExportSettings, RunSettings, SelectSettings
from nbl_export.stages.machine import Rates
from nbl_export.stages.needs import GIB, Need, Sizes, needs, on_device, sizes_of
from nbl_export.stages.resources import Machine, in_words
from nbl_export.stages.room import needed, rooms

MODELS = {
    "1.7B": Shape("SmolLM2-1.7B", 2048, 8192, 24, 32, 32, 49152, True),
    "8B": SHAPES["8B"],
    "70B": Shape("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128256, False),
}


@dataclass(frozen=True)
class Kind:
    """A machine: its memory and assumed rates; with a GPU, that one's memory and how many there are."""

    machine: Machine
    gpu: int = 0
    count: int = 1


# A laptop of eight cores with bfloat16 instructions; an H100 at two fifths of its peak in bfloat16, in a server.
MACHINES = {
    "laptop, 16 GB": Kind(Machine(14 * GIB, Rates(4e11, 1e11, 2e9, 1.5e9))),
    "one 80 GB GPU": Kind(Machine(120 * GIB, Rates(4e14, 3e13, 3e9, 1.5e9)), 80 * 10**9),
    "eight 80 GB GPUs": Kind(Machine(960 * GIB, Rates(4e14, 3e13, 3e9, 1.5e9)), 80 * 10**9, 8),
}
HOST = 1e12  # float64 of the server's processor
WIDTH = 2


def asked(layers: int) -> RunSettings:
    """A run with a given text, half of the layers by CCA, in bfloat16; the rest are defaults."""
    selection = SelectSettings(k=layers // 2, criterion="cca")
    settings = RunSettings(
        selection, CalibrateSettings(("text",)), exporting=ExportSettings("bf16", "concat")
    )
    return settings.resolve(task_named("text-generation"))


def sizes_of_shape(shape: Shape) -> Sizes:
    """The sizes of a model of this shape, stored in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: Any = AutoConfig.for_model(**shape.config())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return sizes_of(model, WIDTH, WIDTH * sum(p.numel() for p in model.parameters()))


def lines() -> Iterator[str]:
    stages = ("calibrate", "select", "export", "rewrite", "verify")
    columns = ("model", "machine", "memory (stage)", "verify", "GPU", "disk", *stages[:-1], "")
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"
    for name, shape in MODELS.items():
        sizes = sizes_of_shape(shape)
        settings = asked(shape.layers)
        each = needs(sizes, settings, WIDTH)
        disk = needed(rooms(sizes.shape, settings))
        for title, kind in MACHINES.items():
            yield row(name, title, kind, sizes, each, disk)


def row(name: str, title: str, kind: Kind, sizes: Sizes, each: list[Need], disk: int) -> str:
    *made, verify = each
    most = max(made, key=lambda need: need.memory)
    shares = {"calibrate": kind.count, "select": kind.count}
    on_cpu = (
        replace(kind.machine, rates=replace(kind.machine.rates, exact=HOST)) if kind.gpu else kind.machine
    )
    on = {"select": on_cpu}  # layers are fitted on the CPU
    times = [
        in_words(on.get(n.stage, kind.machine).seconds(_share(n, shares.get(n.stage, 1)), sizes.file))
        for n in made
    ]
    gpu = on_device(sizes, asked(sizes.shape.layers).calibration, WIDTH) if kind.gpu else 0
    bad = [f"`{need.stage}`" for need in each if need.memory > kind.machine.memory]
    cells = [
        name,
        title,
        f"{most.memory / GIB:,.1f} GiB ({most.stage})",
        f"{verify.memory / GIB:,.0f} GiB",
        f"{gpu / GIB:,.1f} GiB" if gpu else "",
        f"{disk / GIB:,.0f} GiB",
        *times,
        f"not {', '.join(bad)}" if bad else "fits",
    ]
    return "| " + " | ".join(cells) + " |"


def _share(need: Need, count: int) -> Need:
    return replace(need, fast=need.fast / count, exact=need.exact / count)


if __name__ == "__main__":
    print("\n".join(lines()))
