"""What a form computes is held to the gates of its precision: PyTorch itself stands for an engine, right and wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate.text import load_text
from nbl_export.linearize.plan import LinearLayer, Plan, load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.progress import Silent
from nbl_export.runtime.torch import torch_stream
from nbl_export.settings import VerifySettings
from nbl_export.verify.case import DecoderCase
from nbl_export.verify.converted import measure_converted
from nbl_export.workspace import Workspace


@pytest.fixture
def measured(stories_out: Path, stories_model: Any) -> Callable[..., tuple[str, str]]:
    """The verdict of a form that computes by another plan than it should, and what the unmodified one does."""
    ws = Workspace.open(stories_out)
    plan, text = load_plan(ws.plan), load_text(ws.text)
    settings = VerifySettings(decode_steps=2)
    case = DecoderCase(stories_model, plan, ws.baseline, ws.model, settings, Silent(), text)

    def measure(
        precision: str, change: Callable[[LinearLayer], LinearLayer], noise: float = 0.0
    ) -> tuple[str, str]:
        whole = plan.layers
        wrong = replace(plan, layers={i: change(whole[i]) for i in whole})
        plans: dict[str, Plan] = {"form": wrong, "unmodified": plan.without_layers()}

        @contextmanager
        def opened(path: Path, _rows: int, _length: int) -> Any:
            by = plans[path.name]
            with linearized(stories_model, by):
                stream = torch_stream(stories_model, by.linear_attention)
                yield Noisy(stream, noise) if path.name == "unmodified" else stream

        (check,), _ = measure_converted(
            case, Path("form"), precision, "an engine", opened, lambda: Path("unmodified")
        )
        return check.status, check.detail

    return measure


class Noisy:
    """A stream whose logits are off by so much."""

    def __init__(self, stream: Any, noise: float) -> None:
        self._stream, self._noise, self._random = stream, noise, np.random.default_rng(0)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._stream, name)
        if name not in ("prefill", "decode"):
            return found

        def off(*given: Any) -> Any:
            logits = found(*given)
            return logits + self._random.normal(size=logits.shape).astype(np.float32) * self._noise

        return off


def scaled(by: float) -> Callable[[LinearLayer], LinearLayer]:
    return lambda one: LinearLayer((one.w * np.float32(by)).astype(np.float32), one.b)


def test_the_same_plan_passes_in_every_precision(measured: Callable[..., tuple[str, str]]) -> None:
    for precision in ("fp32", "fp16", "bf16", "q8_0"):
        status, detail = measured(precision, scaled(1.0), 0.1)
        assert status == "passed" and "in an engine, within all" in detail


@pytest.mark.parametrize(("precision", "by"), [("fp32", 1.01), ("fp16", 1.05), ("bf16", 1.5)])
def test_another_plan_fails(measured: Callable[..., tuple[str, str]], precision: str, by: float) -> None:
    assert measured(precision, scaled(by))[0] == "failed"


def test_eight_bits_may_cost_what_they_cost_the_unmodified_model(
    measured: Callable[..., tuple[str, str]],
) -> None:
    assert measured("q8_0", scaled(1.02), 1.0)[0] == "passed"
    status, detail = measured("q8_0", scaled(1.02), 1e-3)
    assert status == "failed" and "the unmodified file's own" in detail
