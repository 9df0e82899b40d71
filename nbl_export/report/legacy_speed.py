"""The speed sections of reports of the first version, as this version has them: JSON in, JSON out.

The first version had three schemas: ``speed`` of base and linearized graph, ``engine_speed`` of medians and 99th
percentiles on a GPU, and ``bench`` of laps. Each function takes one such section, as it was read, and gives what
:func:`nbl_export.records.from_json` reads as a :class:`Speed` or a bench; what is in that form already stays as it is.

What the first version did not write is not known here either: an engine's quartiles and interval are nan, and its
speedup is not resolved. Fewer than six rounds, which the first version called resolved, are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nbl_export.errors import InputError

_Json = dict[str, Any]
_BASE, _LINEARIZED = "base", "linearized"
_ENGINES = ("base engine", "linearized engine")
_LEAST_ROUNDS = 6
_REMEDY = "run `nbl-export verify` again"


def speed_section(raw: Mapping[str, Any]) -> _Json:
    """``speed``; raises :class:`InputError` if it is of neither version."""
    if _is_new(raw):
        return dict(raw)
    try:
        costs = {_BASE: raw.get("base_cost"), _LINEARIZED: raw.get("linearized_cost")}
        return {
            "machine": _machine(raw["provider"], raw["threads"], raw.get("roofline")),
            "rounds": raw["rounds"],
            "candidates": [
                {"name": name, "base": _BASE if name == _LINEARIZED else None, "cost": cost}
                for name, cost in costs.items()
            ],
            "cells": [_pair_cell(cell, raw) for cell in raw["cells"]],
        }
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise _damaged("speed", error) from None


def engine_speed_section(raw: Mapping[str, Any]) -> _Json:
    """``engine_speed``; raises :class:`InputError` if it is of neither version."""
    if _is_new(raw):
        return dict(raw)
    try:
        latencies, rounds = raw["latencies"], raw["rounds"]
        names = list(dict.fromkeys(x["name"] for x in latencies))
        contexts = sorted({x["context"] for x in latencies})
        ratios = {r["context"]: r for r in raw["speedups"]}
        return {
            "machine": {"device": raw["gpu"], "compute_capability": raw.get("compute_capability")},
            "rounds": rounds,
            "candidates": [
                {"name": name, "base": _ENGINES[0] if name == _ENGINES[1] else None} for name in names
            ],
            "cells": [
                {
                    "phase": phase,
                    "batch": 1,
                    "context": context,
                    "results": list(_latencies(latencies, context, phase, rounds, ratios.get(context))),
                    "absent": {
                        name: why
                        for name, why in raw["absent"].items()
                        if (name, context) not in {(x["name"], x["context"]) for x in latencies}
                    },
                }
                for context in contexts
                for phase in ("prefill", "decode")
            ],
            "linearized": _ENGINES[1],
        }
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise _damaged("engine_speed", error) from None


def bench_section(raw: Mapping[str, Any]) -> _Json:
    """``bench``, or ``bench.json`` without schema and verdict; raises :class:`InputError` if it is of neither."""
    if "speed" in raw:
        return dict(raw)
    try:
        settings, roofline = raw["settings"], raw["roofline"]
        gpu = settings["device"] == "cuda"
        speed = {
            "machine": _machine(
                roofline["device"] if gpu else "CPUExecutionProvider", roofline["threads"], roofline
            ),
            "rounds": settings["rounds"],
            "candidates": raw["competitors"],
            "cells": [
                {
                    **{key: cell[key] for key in ("phase", "batch", "context", "absent")},
                    "results": [_lap(lap) for lap in cell["laps"]],
                }
                for cell in raw["cells"]
            ],
        }
        kept = {k: v for k, v in raw.items() if k not in ("roofline", "competitors", "cells")}
        return {**kept, "speed": speed}
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged("bench", error) from None


def _is_new(raw: Mapping[str, Any]) -> bool:
    return isinstance(raw, Mapping) and "machine" in raw


def _damaged(section: str, error: Exception) -> InputError:
    return InputError(f"The section {section!r} of the report is damaged ({error!r}): {_REMEDY}.")


def _machine(device: str, threads: int | None, roofline: Mapping[str, Any] | None) -> _Json:
    return {"device": device, "threads": threads, "roofline": roofline}


def _pair_cell(cell: Mapping[str, Any], speed: Mapping[str, Any]) -> _Json:
    """A cell of base and linearized graph, one row."""
    rounds = cell.get("rounds", speed["rounds"])
    over = {
        "value": cell["speedup"],
        "low": cell["speedup_low"],
        "high": cell["speedup_high"],
        "least": cell.get("speedup_least", "nan"),
        "most": cell.get("speedup_most", "nan"),
        "resolved": cell["resolved"],
    }
    tokens = 1 if cell["phase"] == "decode" else cell["context"]
    base, linearized = (
        {
            "name": name,
            "timing": cell[name],
            "rounds": rounds,
            "tokens_per_second": 1e3 * tokens / cell[name]["median_ms"],
        }
        for name in (_BASE, _LINEARIZED)
    )
    linearized |= {
        "over_base": _ratio(over, rounds),
        "ceiling": cell["ceiling"],
    }
    base["linearized_over"] = linearized["over_base"]
    return {"phase": cell["phase"], "batch": 1, "context": cell["context"], "results": [base, linearized]}


def _latencies(
    latencies: Sequence[Mapping[str, Any]],
    context: int,
    phase: str,
    rounds: int,
    ratios: Mapping[str, Any] | None,
) -> Iterator[_Json]:
    for x in latencies:
        if x["context"] != context:
            continue
        median = x[f"{phase}_ms"]
        result: _Json = {
            "name": x["name"],
            "timing": {
                "median_ms": median,
                "low_ms": "nan",
                "high_ms": "nan",
                "p99_ms": x[f"{phase}_p99_ms"],
            },
            "rounds": rounds,
            "tokens_per_second": 1e3 * (1 if phase == "decode" else context) / median,
            "cache_bytes": x["memory_bytes"],
        }
        if ratios and x["name"] == _ENGINES[1]:
            unknown = dict.fromkeys(("low", "high", "least", "most"), "nan")
            result["over_base"] = {"value": ratios[phase], **unknown, "resolved": False}
        yield result


def _lap(lap: Mapping[str, Any]) -> _Json:
    kept = {k: v for k, v in lap.items() if k != "beaten"}
    return {
        **kept,
        "over_base": _ratio(lap["over_base"], lap["rounds"]),
        "linearized_over": _ratio(lap["beaten"], lap["rounds"]),
    }


def _ratio(raw: Mapping[str, Any] | None, rounds: int) -> _Json | None:
    """Without an interval where there are too few rounds for one."""
    if raw is None or rounds >= _LEAST_ROUNDS:
        return None if raw is None else dict(raw)
    return {**raw, "least": "-inf", "most": "inf", "resolved": False}
