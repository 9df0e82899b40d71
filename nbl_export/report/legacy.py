"""Reports of version 1 of the schema, as version 2 has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nbl_export.report.legacy_speed import bench_section, engine_speed_section, speed_section

SCHEMA_1 = "nbl-export/report/1"

# How version 1's sections of what was timed become those of version 2: by name; the others stand as they are.
TIMED: Mapping[str, Callable[[Any], Any]] = {
    "speed": speed_section,
    "engine_speed": engine_speed_section,
    "bench": bench_section,
}

# What stood beside an encoder's figures, and is a decoder's alone.
_OF_STEPS = frozenset({"step", "kv_max_abs", "kv_max_rel", "kv_mean_rel", "kv_worst_layer"})
_LISTS_OF_FIGURES = ("outputs", "pytorch_in_precision")


def from_version_1(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a version-1 report as that of version 2.

    1. ``selection`` says what calibration read, and ``graph`` the opset; version 1 had them in ``settings`` alone.
    2. An encoder's ``parity`` has no figures of a cache, and its outputs no number of a step.
    3. ``engine_parity`` has both engines by role; version 1 had the linearized one's figures beside ``base``.
    4. What was timed (``speed``, ``engine_speed``, ``bench``): :data:`TIMED`.

    Raises ``KeyError``, ``TypeError`` or ``AttributeError`` for what is no report.
    """
    settings = raw["settings"]
    calibrate = settings["calibrate"]
    return {
        **raw,
        "selection": {
            **raw["selection"],
            "sources": calibrate["sources"],
            "seed": calibrate["seed"],
        },
        "graph": {**raw["graph"], "opset": settings["export"].get("opset")},
        "parity": _parity(raw["parity"]),
        "engine_parity": _engine_parity(raw.get("engine_parity")),
        **{name: make(raw[name]) for name, make in TIMED.items() if raw.get(name)},
    }


def _parity(raw: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if raw is None or "outputs" not in raw:
        return None if raw is None else dict(raw)
    lists = {name: raw[name] for name in _LISTS_OF_FIGURES if raw.get(name)}
    return {**raw, **{name: [_of_output(one) for one in found] for name, found in lists.items()}}


def _of_output(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name not in _OF_STEPS}


def _engine_parity(raw: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if raw is None:
        return None
    linearized = {name: value for name, value in raw.items() if name != "base"}
    return {"linearized": linearized or None, "base": raw.get("base")}
