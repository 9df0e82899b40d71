"""The tables have all that was found; the lines that can be copied are whole."""

from __future__ import annotations

from dataclasses import replace

from nbl_export.doctor.diagnosis import Diagnosis
from nbl_export.doctor.machine import Machine
from nbl_export.doctor.tables import diagnosis_tables, offers
from nbl_export.engine.gpu import Gpu
from tests.doctor.made import MACHINE, parts

FOUND = Diagnosis("0.1.0", "/work/clone", MACHINE, parts(tensorrt=None, timm={"error": "failed"}), (), ())


def facts(machine: Machine) -> dict[str, str]:
    return dict(diagnosis_tables(replace(FOUND, machine=machine))[0].rows)  # type: ignore[arg-type]


def test_the_machine() -> None:
    shown = facts(MACHINE)
    assert shown["memory"] == "16.0 GiB, 8.0 GiB free" and shown["cores"] == "2"
    assert shown["disk here"] == "100.0 GiB free in /work"
    assert shown["bf16 products"].startswith("yes") and shown["GPU"].startswith("none: no NVIDIA driver")
    assert facts(replace(MACHINE, bf16=False))["bf16 products"].startswith("no")
    assert "bf16 products" not in facts(replace(MACHINE, bf16=None))
    assert "memory" not in facts(replace(MACHINE, memory=None))
    assert facts(replace(MACHINE, all_cores=64))["cores"] == "2 of 64"


def test_each_gpu() -> None:
    gpus = Gpu("NVIDIA H100", "9.0"), Gpu("NVIDIA L4", "8.9")
    machine = replace(
        MACHINE, gpus=gpus, gpu_memory=(80 << 30, 24 << 30), driver="570.86", no_gpu={"torch": "no CUDA"}
    )
    shown = facts(machine)
    assert shown["GPU 0"] == "NVIDIA H100, 80.0 GiB, compute capability 9.0, driver 570.86"
    assert shown["GPU 1"] == "NVIDIA L4, 24.0 GiB, compute capability 8.9, driver 570.86"
    assert "GPU" not in shown and shown[""] == "torch: no CUDA"


def test_each_package_has_a_state() -> None:
    table = diagnosis_tables(FOUND)[1]
    states = {row[0]: row[1:3] for row in table.rows}
    assert len(states) == len(FOUND.parts)
    assert states["torch"] == ("1.0", "works")
    assert states["tensorrt"] == ("", "missing")
    assert states["timm"] == ("1.0", "broken")


def test_what_is_missing_is_offered_with_its_line() -> None:
    found = dict(offers(FOUND))
    assert {use.partition(":")[0] for use in found} == {"tensorrt", "onnxruntime-gpu"}
    (line,) = (line for use, line in found.items() if use.startswith("tensorrt:"))
    assert line == next(one.pip for one in FOUND.parts if one.package == "tensorrt")
    lacks = replace(FOUND, parts=parts(torch=None))
    assert not any(use.startswith("torch:") for use, _ in offers(lacks)), "that is said apart"
