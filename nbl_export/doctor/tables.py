"""A diagnosis as tables, and what is missing as lines that can be copied."""

from __future__ import annotations

from collections.abc import Iterator

from nbl_export.doctor.diagnosis import Diagnosis, Found
from nbl_export.doctor.machine import Machine, Place
from nbl_export.report.drawing import Table

WORKS, BROKEN, MISSING = "works", "broken", "missing"


def diagnosis_tables(found: Diagnosis) -> list[Table]:
    """The machine, then the packages."""
    title = f"nbl-export {found.version} from {found.origin}"
    return [
        Table(title, ("", "this machine"), tuple(_machine(found.machine))),
        Table("Packages", ("package", "version", "state", "for"), tuple(map(_row, found.parts))),
    ]


def offers(found: Diagnosis) -> list[tuple[str, str]]:
    """What each missing package would bring, and the command that brings it; what the main job lacks is said apart."""
    return [
        (f"{one.package}: {one.use}", one.pip)
        for one in found.parts
        if one.version is None and one.extra != ""
    ]


def _row(one: Found) -> tuple[str, ...]:
    state = WORKS if one.works else MISSING if one.version is None else BROKEN
    return one.package, one.version or "", state, f"{one.use} ({one.detail})" if one.detail else one.use


def _machine(machine: Machine) -> Iterator[tuple[str, str]]:
    yield "Python", f"{machine.python}, {machine.executable}"
    yield "system", machine.system
    yield "processor", machine.processor
    fewer = machine.cores < machine.all_cores
    yield "cores", f"{machine.cores} of {machine.all_cores}" if fewer else str(machine.cores)
    if machine.memory is not None and machine.memory_free is not None:
        yield "memory", f"{_gib(machine.memory)}, {_gib(machine.memory_free)} free"
    yield "disk here", _place(machine.here)
    yield "temporary files", _place(machine.temporary)
    if machine.bf16 is not None:
        how = "yes: models run in bfloat16" if machine.bf16 else "no: models run in float32"
        yield "bf16 products", how
    for number, gpu in enumerate(machine.gpus):
        memory = _gib(machine.gpu_memory[number])
        capability = f"compute capability {gpu.compute_capability}"
        yield f"GPU {number}", f"{gpu.name}, {memory}, {capability}, driver {machine.driver}"
    for number, (name, why) in enumerate(machine.no_gpu.items()):
        none = not machine.gpus and number == 0
        yield ("GPU" if none else ""), (f"none: {why}" if none else f"{name}: {why}")


def _place(place: Place) -> str:
    if not place.folder:
        return "none"
    return place.folder if place.free is None else f"{_gib(place.free)} free in {place.folder}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
