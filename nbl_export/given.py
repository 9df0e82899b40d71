"""What was given on the command line, as the settings of the stages.

Only what the terminal knows is settled here: lists as text, `auto`, and defaults that depend on another option.
"""

from __future__ import annotations

from typing import Any

import typer


def layers_of(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else numbers("--layers", text)


def numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{option} is {text!r}; give whole numbers with commas, as 3,7,12."
        ) from None


def calibration_settings(
    sources: Any, field: str, samples: int, seq_len: int, selection: int, heldout: int, seed: int, dtype: Any
) -> Any:
    from nbl_export.settings import CalibrateSettings

    named = tuple(sources or ("self",))
    return CalibrateSettings(named, samples, seq_len, heldout, selection, field, seed, dtype)


def select_settings(
    k: str | None,
    budget: Any,
    layers: str | None,
    criterion: str | None,
    fit: Any,
    repair: int,
    repair_rank: int,
    rank: int | None,
    fit_input: Any,
    ridge: str,
    seed: int,
) -> Any:
    from nbl_export.settings import SelectSettings, auto_budget

    count = None
    if k == "auto":
        budget = auto_budget(budget)
    elif k is not None:
        count = number("--k", k, int, "a whole number or auto")
    how_far = None if ridge == "auto" else number("--ridge", ridge, float, "a number or auto")
    return SelectSettings(
        count, layers_of(layers), criterion, fit_input, how_far, fit, repair, repair_rank, rank, seed, budget
    )


def budget(max_kl: float | None, max_ppl_ratio: float | None, min_speedup: float | None) -> Any:
    from nbl_export.linearize.budget import Budget

    return Budget(max_kl, max_ppl_ratio, min_speedup)


def number(option: str, text: str, kind: Any, wanted: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise typer.BadParameter(f"{option} is {text!r}; give {wanted}.") from None


def export_settings(
    exporter: str, python: str | None, precision: str | None, kv_cache: str | None, engines: bool
) -> Any:
    from nbl_export.export.choices import choices_of
    from nbl_export.settings import ExportSettings

    offered = choices_of(exporter)
    # What an engine is fastest with, where the user does not say.
    if engines:
        precision = precision or ("fp16" if "fp16" in offered.precisions else None)
    return ExportSettings(precision or offered.precisions[0], kv_cache, exporter, python)


def engine_settings(
    library: str | None, sm: str | None, max_batch: int, max_seq: int | None, max_context: int | None
) -> Any:
    from nbl_export.settings import EngineSettings

    targets = tuple(sm.split(",")) if sm else ()
    return EngineSettings(library or "auto", max_batch, max_seq, max_context, targets)


def verify_settings(steps: int, contexts: str, rounds: int, quality: bool, speed: bool) -> Any:
    from nbl_export.settings import VerifySettings

    return VerifySettings(steps, quality, speed, numbers("--contexts", contexts), rounds)
