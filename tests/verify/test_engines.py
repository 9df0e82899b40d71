"""Engines measured: what passes, what fails, what is skipped and why, and the race, on scripted times."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.calibrate.text import CalibrationText
from nbl_export.engine.build import EngineFile
from nbl_export.engine.library import Gpu
from nbl_export.engine.network import Limits
from nbl_export.errors import BuildError, InputError, NblError
from nbl_export.linearize.plan import Plan
from nbl_export.models.lengths import Crossed, Length
from nbl_export.models.load import in_precision
from nbl_export.runtime.tensorrt import EngineStream
from nbl_export.settings import VerifySettings
from nbl_export.verify import engines as module
from nbl_export.verify.case import fitting_prompts
from nbl_export.verify.decoder import measure_decoder
from nbl_export.verify.measurement import Measurement
from nbl_export.verify.speed.values import Result, Speed
from tests.runtime.fake_tensorrt import Graphs, loaded_engine, manifest_of
from tests.verify.measured import LAYERS, PARITY, case_of, changed, checks

L4 = Gpu("NVIDIA L4", "8.9")


def timed(speed: Speed) -> dict[tuple[str, int, str], Result]:
    """By name, context and phase."""
    return {(r.name, c.context, c.phase): r for c in speed.cells for r in c.results}


def speedups(speed: Speed) -> list[tuple[int, str, float]]:
    return [(cell.context, cell.phase, over.value) for cell, _, over in speed.speedups()]


@pytest.mark.parametrize(("positions", "steps", "most"), [(512, 448, 447), (512, 10**5, 447), (32, 16, 15)])
def test_steps_that_do_not_fit_are_refused(positions: int, steps: int, most: int) -> None:
    with pytest.raises(InputError, match=f"the model has {positions} positions: ask for {most} or fewer"):
        fitting_prompts(positions, 1, steps)


ROOM = Limits(max_batch=3, max_seq=70, max_context=96)


Measure = Callable[..., Measurement]


@pytest.fixture
def on_gpu(graphs: Graphs, text: CalibrationText, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Measure a pair of engines of the named graphs as if on a GPU; ``engine`` is another linearized one's graph."""

    def run(
        form: str = "static",
        precision: str = "fp32",
        settings: VerifySettings = PARITY,
        limits: Limits = ROOM,
        engine: Path | None = None,
        base_engine: Path | None = None,
    ) -> Measurement:
        base, linear = graphs(form, precision), graphs(form, precision, LAYERS)
        pair = [
            EngineFile(path, manifest_of(path, limits, role))
            for path, role in ((base_engine or base, "base"), (engine or linear, "linearized"))
        ]
        monkeypatch.setattr(module, "find_gpu", lambda: L4)
        monkeypatch.setattr(module, "load_engine", functools.partial(loaded_engine, limits=limits))
        return measure_decoder(case_of(graphs, plan, text, base, linear, settings, pair))

    return run


@pytest.mark.parametrize(
    ("form", "precision"), [("static", "fp32"), ("concat", "fp32"), ("static", "fp16"), ("concat", "bf16")]
)
def test_a_right_engine_passes(on_gpu: Measure, form: str, precision: str) -> None:
    result = on_gpu(form, precision)
    told = checks(result)
    assert told["engine build"].status == told["parity"].status == told["engine parity"].status == "passed"
    assert "on NVIDIA L4, within all" in told["engine parity"].detail and "engine run" not in told
    assert result.engine_parity is not None and result.engine_speed is None
    found = result.engine_parity.linearized
    assert found is not None and [s.step for s in found.steps] == [0, 1, 2, 3, 4]
    # Ragged, and as many tokens as that: all but the last four of each row in the prefill.
    assert found.prompt_lengths == (65, 42, 24) and found.steps[0].tokens == sum(found.prompt_lengths)
    assert (max(s.max_abs for s in found.steps) < 1e-3) == (precision == "fp32")


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [
        (Limits(1, 70, 96), (65,)),
        (Limits(2, 50, 96), (50, 32)),
        (Limits(3, 60, 61), (57, 36, 21)),  # shorter and still ragged; four places are left for decoding
    ],
)
def test_rows_are_as_long_as_the_engine_takes(
    on_gpu: Measure, limits: Limits, lengths: tuple[int, ...]
) -> None:
    result = on_gpu(limits=limits)
    assert checks(result)["engine parity"].status == "passed"
    assert result.engine_parity is not None and result.engine_parity.linearized is not None
    assert result.engine_parity.linearized.prompt_lengths == lengths


def test_rows_that_cross_a_length_are_run_where_they_fit(
    on_gpu: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    crossed = Crossed(Length("window", 50, (0,)), (60, 90, 48))
    monkeypatch.setattr(module, "crossed_by", lambda *_: (crossed,))
    result = on_gpu(limits=Limits(3, 70, 80))
    assert checks(result)["engine parity"].status == "passed"
    assert result.engine_parity is not None and result.engine_parity.linearized is not None
    found = result.engine_parity.linearized
    assert found.steps[0].tokens == sum(found.prompt_lengths) + 60 + 48
    assert {s.tokens for s in found.steps[1:]} == {3 + 2}


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_an_engine_of_other_weights_fails(
    on_gpu: Measure, graphs: Graphs, tmp_path: Path, factor: float
) -> None:
    wrong = changed(graphs("static", "fp32", LAYERS), tmp_path, "<f4", factor)
    found = checks(on_gpu(engine=wrong))
    # The graph itself is right; only what runs on the GPU is not.
    assert found["parity"].status == "passed"
    assert found["engine parity"].status == "failed"
    assert (
        "max |Δlogit| is" in found["engine parity"].detail
        and "gate is 0.001" in found["engine parity"].detail
    )


def test_an_engine_that_cannot_run_is_a_failed_check_and_not_the_end(
    on_gpu: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_self: Any, profile: str) -> None:
        raise BuildError(f"The engine failed to run its {profile} profile.")

    monkeypatch.setattr(EngineStream, "_execute", broken)
    found = checks(on_gpu())
    assert found["parity"].status == "passed"
    for name in ("engine parity", "base engine parity"):
        assert (found[name].status, found[name].detail) == (
            "failed",
            "The engine failed to run its prefill profile.",
        )


@pytest.mark.parametrize("limits", [Limits(3, 4, 8), Limits(3, 1, 2)], ids=str)
def test_an_engine_too_short_for_the_steps_is_no_crash_and_no_pass(on_gpu: Measure, limits: Limits) -> None:
    """``build --max-context 8`` and ``verify --decode-steps 8`` are both allowed."""
    try:
        result = on_gpu(settings=replace(PARITY, decode_steps=8), limits=limits)
    except NblError as error:
        assert "context" in str(error)
        return
    told = [c for c in result.checks if c.name in ("engine parity", "engine run")]
    assert told and "passed" not in {c.status for c in told if result.engine_parity is None}


def test_without_a_gpu_nothing_is_run_and_nothing_passes(
    on_gpu: Measure, monkeypatch: pytest.MonkeyPatch, graphs: Graphs, text: CalibrationText, plan: Plan
) -> None:
    monkeypatch.setattr(module, "find_gpu", lambda: None)
    monkeypatch.setattr(module, "load_engine", lambda path: pytest.fail("loaded"))
    base, linear = graphs("static", "fp16"), graphs("static", "fp16", LAYERS)
    ahead = {"ahead_of_time": True, "capabilities": ("SM86", "SM89"), "gpu": None}
    pair = [
        EngineFile(p, manifest_of(p, role=r, **ahead)) for p, r in ((base, "base"), (linear, "linearized"))
    ]
    settings = replace(PARITY, speed=True)
    result = measure_decoder(case_of(graphs, plan, text, base, linear, settings, pair))
    found = checks(result)
    assert found["engine build"].status == "passed"
    assert found["engine run"].status == "skipped"
    assert found["engine run"].detail == (
        "engine built (ahead of time for SM86, SM89); not run: no NVIDIA GPU"
    )
    assert {n for n in found if n.startswith("engine")} == {"engine build", "engine run"}
    assert result.engine_parity is None and result.engine_speed is None
    # Nothing of a GPU can be said from a CPU without its kernels.
    assert (
        found["speed"].status == "skipped" and "does not compute in half precision" in found["speed"].detail
    )


@pytest.fixture
def eager_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def converted(model: torch.nn.Module, dtype: str, device: str) -> Any:
        assert device == "cuda"
        return in_precision(model, dtype)

    monkeypatch.setattr(module, "in_precision", converted)


@pytest.mark.usefixtures("eager_on_cpu")
def test_speed_of_everyone_at_the_contexts_that_the_engines_hold(on_gpu: Measure) -> None:
    """65 tokens are more than one prefill holds."""
    settings = replace(PARITY, speed=True, contexts=(8, 64, 65), rounds=3)
    result = on_gpu("static", "fp16", settings, Limits(2, 64, 96))
    assert result.engine_speed is not None
    speed = result.engine_speed
    ran = [(r.name, c.context) for c in speed.cells for r in c.results if c.phase == "decode"]
    names = ["base engine", "linearized engine", "PyTorch eager, base"]
    assert ran == [(name, context) for context in (8, 64) for name in names]
    assert [cell.context for cell, _, _ in speed.speedups()] == [8, 8, 64, 64]
    assert speed.machine.device == "NVIDIA L4"
    for graph in ("base", "linearized"):
        name, why = f"onnxruntime CUDA, {graph}", "onnxruntime has no CUDAExecutionProvider here"
        assert all(cell.absent[name] == why for cell in speed.cells)
        assert result.notes.count(f"Not timed on the GPU: {name}: {why}.") == 1
