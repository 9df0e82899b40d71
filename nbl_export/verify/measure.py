"""All measurements of a rewritten graph in order: parity, method loss, speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nbl_export.calibrate.text import CalibrationText
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.swap import linearized
from nbl_export.progress import Listener
from nbl_export.report.schema import Check
from nbl_export.runtime.ort import OrtDecoder
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.settings import VerifySettings
from nbl_export.verify.localize import first_divergence
from nbl_export.verify.noise import rounding_noise
from nbl_export.verify.parity import compare_decoders, gates_for
from nbl_export.verify.quality import measure_method_loss
from nbl_export.verify.speed import measure_speed

if TYPE_CHECKING:
    import torch

# Ragged on purpose: the batch must be padded on the left, by different amounts.
_PROMPTS = (64, 41, 23)


@dataclass
class Measurement:
    """What was measured, as the report's sections; a section that was not run is None and a check says why."""

    parity: dict[str, Any] | None = None
    divergence: str | None = None
    method_loss: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def measure(
    model: torch.nn.Module,
    plan: Plan,
    text: CalibrationText,
    baseline: Path,
    rewritten: Path,
    settings: VerifySettings,
    listener: Listener,
) -> Measurement:
    """Measure the graph ``rewritten`` from ``baseline`` by ``plan`` against the original ``model``."""
    result = Measurement()
    _measure_parity(result, model, plan, text, rewritten, settings.decode_steps, listener)
    if settings.quality:
        loss = measure_method_loss(model, plan, text.heldout, text.heldout_document, listener)
        result.method_loss = loss.as_json()
    else:
        result.checks.append(Check("method loss", "skipped", "--no-quality"))
    if settings.speed:
        contexts = _contexts(result, model, settings.contexts)
        result.speed = measure_speed(baseline, rewritten, contexts, settings.rounds, listener).as_json()
    else:
        result.checks.append(Check("speed", "skipped", "--no-speed"))
    return result


def _measure_parity(
    result: Measurement,
    model: torch.nn.Module,
    plan: Plan,
    text: CalibrationText,
    rewritten: Path,
    steps: int,
    listener: Listener,
) -> None:
    # Prompts begin with the beginning-of-text token, as in use: without it the attention sinks of a
    # linearized model settle on chance tokens, which can amplify rounding a hundredfold.
    ends = np.cumsum([prompt + steps for prompt in _PROMPTS])
    rows = [
        np.concatenate([text.start, row])
        for row in np.split(np.resize(text.heldout.reshape(-1), ends[-1]), ends[:-1])
    ]
    with linearized(model, plan):
        reference = TorchDecoder(model, plan.chosen)
        parity = compare_decoders(
            reference, OrtDecoder(rewritten), rows, steps, gates_for("float32"), listener
        )
        noise = rounding_noise(model, rows)
    result.parity = {**parity.as_json(), "rounding_noise": noise}
    failures = parity.failures()
    if not failures:
        worst = max(s.max_abs for s in parity.steps)
        detail = f"max |Δlogit| {worst:.2g} over a prefill and {steps} decode steps, within all float32 gates"
        result.checks.append(Check("parity", "passed", detail))
        return
    first = first_divergence(model, plan, rewritten)
    result.divergence = str(first)
    if first.layer is None and noise > parity.gates.max_abs_logit / 4:
        result.divergence = (
            "every attention layer agrees, but the linearized PyTorch model's own logits move by "
            f"{noise:.1e} when its embeddings change in the last bit: this plan amplifies rounding; "
            "try other layers or another criterion"
        )
    result.checks.append(Check("parity", "failed", "; ".join([*failures, result.divergence])))


def _contexts(result: Measurement, model: torch.nn.Module, contexts: Sequence[int]) -> list[int]:
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    fitting = [c for c in contexts if limit is None or c + 1 <= limit]
    if dropped := sorted(set(contexts) - set(fitting)):
        result.notes.append(
            f"Speed at {', '.join(map(str, dropped))} tokens is left out: the model has {limit} positions."
        )
    return fitting or [max(2, (limit or 16) // 2)]
