"""Findings made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nbl_export.doctor.diagnosis import Found
from nbl_export.doctor.machine import Machine, Place
from nbl_export.parts import PARTS

MACHINE = Machine(
    python="3.11.7",
    executable="/usr/bin/python3",
    system="Linux x86_64",
    processor="A processor",
    cores=2,
    all_cores=2,
    memory=16 << 30,
    memory_free=8 << 30,
    here=Place("/work", 100 << 30),
    temporary=Place("/tmp", 50 << 30),
    bf16=True,
    gpus=(),
    gpu_memory=(),
    driver="",
    no_gpu={"the NVIDIA driver": "no NVIDIA driver (libcuda.so.1 does not load)"},
    encoding="UTF-8",
)


ALL = tuple(Found(part.package, "1.0", "", part.use, "", part.extra, "", part.pip) for part in PARTS)


def parts(**changed: Any) -> tuple[Found, ...]:
    """All parts in version 1.0, but onnxruntime-gpu; ``changed`` by name (``-`` is ``_``): fields, None if missing."""
    made = []
    for one in ALL:
        fields = changed.get(one.package.replace("-", "_"), {})
        gone = fields is None or (one.package == "onnxruntime-gpu" and not fields)
        made.append(replace(one, **({"version": None} if gone else fields or {})))
    return tuple(made)
