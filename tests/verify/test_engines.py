"""Built engines in the report, and the race against everything else. No time is asserted but scripted ones."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from nbl_export.engine.build import EngineFile
from nbl_export.engine.library import Gpu
from nbl_export.engine.network import Limits
from nbl_export.errors import InputError, NblError
from nbl_export.progress import Silent
from nbl_export.report.speed import ENGINES, speed_table
from nbl_export.runtime import ort as ort_module
from nbl_export.runtime.tensorrt import EngineStream
from nbl_export.settings import VerifySettings
from nbl_export.verify import engines as module
from nbl_export.verify.engines import (
    RunningEngines,
    built_check,
    engine_speed,
    fitting_prompts,
    gpu_candidates,
    measure_engine_speed,
    not_run,
)
from nbl_export.verify.speed.candidates import (
    TIMED_STEPS,
    Candidate,
    OrtGraph,
    TorchPrompt,
)
from nbl_export.verify.speed.race import Rounds, race
from nbl_export.verify.speed.values import Result, Speed
from tests.runtime.fake_tensorrt import Graphs, loaded_engine, manifest_of
from tests.verify.clocked import Scripted

L4 = Gpu("NVIDIA L4", "8.9")
ALL = (0, 1, 2, 3, 4)
ROOM = Limits(max_batch=2, max_seq=12, max_context=12 + TIMED_STEPS)


# lines of the report -----------------------------------------------------------------------------


def test_what_was_built_in_one_line(graphs: Graphs) -> None:
    base, linear = (graphs("static", "fp16", layers) for layers in ((), (0, 3)))
    pair = [
        EngineFile(base, manifest_of(base, role="base", size=3 << 20)),
        EngineFile(linear, manifest_of(linear, attention="decomposed", size=(2 << 20) + 100_000)),
    ]
    check = built_check(pair)
    assert (check.name, check.status) == ("engine build", "passed")
    assert check.detail == (
        "tensorrt 10.16.0, fp16: base 3.0 MiB with 5 fused attention layers; "
        "linearized 2.1 MiB with 3 decomposed attention layers"
    )
    nothing = manifest_of(base, network=replace(manifest_of(base).network, attention=0))
    assert built_check([EngineFile(base, nothing)]).detail.endswith("3.0 MiB with decomposed attention")
    nothing = graphs("static", "fp16", ALL)
    assert built_check([EngineFile(nothing, manifest_of(nothing))]).detail.endswith(
        "3.0 MiB with no attention"
    )


def test_what_was_not_run_is_never_called_passed(graphs: Graphs) -> None:
    path = graphs("static")
    ahead = manifest_of(path, ahead_of_time=True, capabilities=("SM86", "SM89"), gpu=None)
    check = not_run([EngineFile(path, ahead)], "no NVIDIA GPU")
    assert (check.name, check.status) == ("engine run", "skipped")
    assert check.detail == "engine built (ahead of time for SM86, SM89); not run: no NVIDIA GPU"
    here = not_run([EngineFile(path, manifest_of(path))], "too new")
    assert here.detail == "engine built (for SM89); not run: too new" and here.status == "skipped"


# the race ----------------------------------------------------------------------------------------


def quantile(values: Sequence[float], q: float) -> float:
    """Between the two nearest in order, by hand."""
    ordered, place = sorted(values), q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def timed(speed: Speed) -> dict[tuple[str, int, str], Result]:
    """By name, context and phase."""
    return {(r.name, c.context, c.phase): r for c in speed.cells for r in c.results}


def speedups(speed: Speed) -> list[tuple[int, str, float]]:
    return [(cell.context, cell.phase, over.value) for cell, _, over in speed.speedups()]


def test_a_race_by_hand(clock: list[float]) -> None:
    log: list[str] = []
    numbers = np.random.default_rng(3).uniform(1e-3, 9e-3, 1000)
    # The warm-up of each phase takes a thousand times as long, which nothing may show, nor the step that is not timed.
    steps = TIMED_STEPS
    warm = {0, *range(5, 5 + steps), *range(5, 5 + 5 * steps, steps)}
    seconds = [lambda n, o=o: float(numbers[n + o]) * (1000 if n in warm else 1) for o in (0, 300, 600)]
    prompts = {n: Scripted(n, clock, log, s) for n, s in zip("abc", seconds, strict=True)}
    candidates = [Candidate(n, lambda *_, c=c: c) for n, c in prompts.items()]
    speed = measure_engine_speed(L4, candidates, (64,), 4)
    turns = [f"{t} prefill" for t in "abc" * 5]
    turns += [line for t in "abc" * 5 for line in (f"{t} rewind", *[f"{t} step"] * steps)]
    assert log == turns
    assert [(c.phase, c.context) for c in speed.cells] == [("prefill", 64), ("decode", 64)]
    for cell in speed.cells:
        assert [r.name for r in cell.results] == ["a", "b", "c"]
    for name, prompt in prompts.items():
        prefill = prompt.times["prefill"][1:]
        rounds = [prompt.times["step"][n * steps + 1 : (n + 1) * steps] for n in range(1, 5)]
        step = [s for one in rounds for s in one]
        assert len(prefill) == 4 and len(step) == 4 * (steps - 1)
        first, later = (timed(speed)[name, 64, phase] for phase in ("prefill", "decode"))
        rounded = functools.partial(pytest.approx, abs=1e-4)
        assert first.timing.median_ms == rounded(1e3 * (sorted(prefill)[1] + sorted(prefill)[2]) / 2)
        assert first.timing.p99_ms == rounded(1e3 * quantile(prefill, 0.99))
        assert later.timing.median_ms == rounded(1e3 * quantile([sum(r) / len(r) for r in rounds], 0.5))
        assert later.timing.p99_ms == rounded(1e3 * quantile(step, 0.99))
        assert later.tokens_per_second == pytest.approx(1e3 / later.timing.median_ms)
        assert first.tokens_per_second == pytest.approx(64e3 / first.timing.median_ms)
        assert first.cache_bytes == later.cache_bytes == 1001


def test_speedups_by_hand(clock: list[float]) -> None:
    """Of the linearized engine over the base engine, where both took part; other pairs stand in the table."""

    def lasting(name: str, *seconds: float) -> Callable[[int, int], Any]:
        by_context = dict(zip((64, 128, 512), seconds, strict=False))
        return lambda context, _: Scripted(name, clock, [], lambda n: by_context[context])

    candidates = [
        Candidate("base engine", lasting("base engine", 3.0, 3.0, 10.0)),
        Candidate("linearized engine", lasting("linearized engine", 6.0), "base engine"),
        Candidate("onnxruntime CUDA, base", lasting("o", 1.0, 1.0, 1.0)),
        Candidate("onnxruntime CUDA, linearized", lasting("p", 0.5, 0.5, 4.0), "onnxruntime CUDA, base"),
    ]
    speed = measure_engine_speed(L4, candidates, (512, 64), 6)
    assert speedups(speed) == [(64, "prefill", 0.5), (64, "decode", pytest.approx(0.5))]
    over = timed(speed)["onnxruntime CUDA, linearized", 512, "decode"].over_base
    assert over and over.value == pytest.approx(0.25) and over.resolved
    assert timed(speed)["base engine", 64, "prefill"].linearized_over.value == 0.5  # type: ignore[union-attr]


def raising(error: Exception) -> Callable[[int, int], Any]:
    def make(_context: int, _batch: int) -> Any:
        raise error

    return make


@pytest.mark.parametrize(
    "error",
    [
        NblError("onnxruntime has no CUDAExecutionProvider here"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB"),
        RuntimeException("[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : no room"),
        RuntimeError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_who_cannot_take_part_is_left_out_with_the_reason(clock: list[float], error: Exception) -> None:
    log: list[str] = []
    candidates = [
        Candidate("onnxruntime CUDA, base", raising(error)),
        Candidate("base engine", lambda *_: Scripted("base engine", clock, log, lambda n: 0.004)),
        Candidate(
            "linearized engine",
            lambda *_: Scripted("linearized engine", clock, log, lambda n: 0.001),
            "base engine",
        ),
    ]
    speed = measure_engine_speed(L4, candidates, (8, 32), 3)
    assert [name for name, _ in speed.absent()] == ["onnxruntime CUDA, base"]
    ((_, reason),) = speed.absent()
    assert reason and "\n" not in reason and str(error).partition("\n")[0] in reason
    assert list(timed(speed)) == [
        (name, context, phase)
        for context in (8, 32)
        for phase in ("prefill", "decode")
        for name in ("base engine", "linearized engine")
    ]
    found = speedups(speed)
    assert [(context, phase) for context, phase, _ in found] == [
        (c, p) for c in (8, 32) for p in ("prefill", "decode")
    ]
    assert all(value == pytest.approx(4) for _, _, value in found)
    assert (speed.machine.device, speed.machine.compute_capability) == ("NVIDIA L4", "8.9")
    assert speed.rounds == 3 and speed.machine.roofline is None
    table = speed_table(ENGINES, speed)
    assert table.title == "Speed on NVIDIA L4, batch 1" and len(table.rows) == 8
    assert ("prefill 32", "linearized engine", "4.00×") in [(*row[:2], row[5]) for row in table.rows]
    assert (
        "p99" in table.columns and "onnxruntime CUDA, base in prefill 8, decode 8, prefill 32" in table.note
    )


@pytest.mark.parametrize("at", [0, 7, 7 + TIMED_STEPS + 4], ids=["prefill", "step", "later round"])
def test_who_finds_no_room_while_running_is_left_out_too(clock: list[float], at: int) -> None:
    """An engine allocates its cache in the first prefill, eager PyTorch its activations."""

    def full(call: int) -> float:
        if call == at:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
        return 0.5

    log: list[str] = []
    makes: dict[str, Callable[[int, int], Any]] = {
        "base engine": lambda *_: Scripted("base engine", clock, [], lambda n: 0.004),
        "linearized engine": lambda c, _: Scripted(
            "linearized engine", clock, [], full if c == 8 else lambda n: 1
        ),
        "another": lambda *_: Scripted("another", clock, log, lambda n: 0.002),
    }
    bases = {"linearized engine": "base engine"}
    candidates = [Candidate(name, make, bases.get(name)) for name, make in makes.items()]
    speed = measure_engine_speed(L4, candidates, (8, 16), 6)
    found = timed(speed)
    phases = ("prefill", "decode") if at == 0 else ("decode",)
    everyone = {(name, c, phase) for name in makes for c in (8, 16) for phase in ("prefill", "decode")}
    assert found.keys() == everyone - {("linearized engine", 8, phase) for phase in phases}
    assert list(speed.absent()) == [("linearized engine", "CUDA out of memory.")]
    assert [c for c, phase, _ in speedups(speed) if phase == "decode"] == [16]
    assert log.count("another prefill") == 2 * 7 and log.count("another rewind") == 2 * 7
    for context in (8, 16):
        assert found["base engine", context, "decode"].timing.median_ms == pytest.approx(4)
        assert found["another", context, "prefill"].timing.p99_ms == pytest.approx(2)
    with pytest.raises(torch.OutOfMemoryError):
        prompt = makes["linearized engine"](8, 1)
        race({"linearized engine": prompt}, _both, Rounds(3, 3), lambda _: None)


def _both(prompt: Any) -> None:
    prompt.prefill()
    for _ in range(TIMED_STEPS):
        prompt.step()


def test_a_cache_that_numpy_cannot_hold_leaves_onnxruntime_out(
    graphs: Graphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bfloat16 graph in a provider that has its kernels, where no stand-in is used."""
    real = ort_module.session(graphs("static"))
    bf16 = [types.SimpleNamespace(name=i.name, type=i.type, shape=i.shape) for i in real.get_inputs()]
    for value in bf16:
        value.type = value.type.replace("float", "bfloat16")
    fake = types.SimpleNamespace(get_inputs=lambda: bf16, get_modelmeta=real.get_modelmeta)
    monkeypatch.setattr(ort_module, "session", lambda *_, **__: fake)
    speed = measure_engine_speed(L4, [Candidate("ort", OrtGraph(graphs("static")))], (8,), 3)
    assert not timed(speed) and all("bfloat16" in cell.absent["ort"] for cell in speed.cells)


# on a GPU ----------------------------------------------------------------------------------------


def test_who_takes_part_on_a_gpu(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[tuple[str, str]] = []

    def in_precision(model: Any, dtype: str, device: str) -> Any:
        assert model is graphs.model
        copies.append((dtype, device))
        return model

    monkeypatch.setattr(module, "in_precision", in_precision)
    paths = {"base": graphs("static"), "linearized": graphs("static", "fp32", (0, 3))}
    streams = {role: EngineStream(loaded_engine(path, ROOM)) for role, path in paths.items()}
    manifest = types.SimpleNamespace(precision="fp16", limits=Limits(4, 12, 28))
    case: Any = types.SimpleNamespace(
        model=graphs.model,
        graphs=paths,
        engines=(types.SimpleNamespace(manifest=manifest),),
        settings=VerifySettings(rounds=3),
        listener=Silent(),
    )
    running = RunningEngines(case, L4, streams)
    candidates = {c.name: c for c in gpu_candidates(running)}
    assert {name: c.base for name, c in candidates.items()} == {
        "base engine": None,
        "linearized engine": "base engine",
        "onnxruntime CUDA, base": None,
        "onnxruntime CUDA, linearized": "onnxruntime CUDA, base",
        "PyTorch eager, base": None,
    }
    assert copies == []
    made = [candidates["PyTorch eager, base"].make(context, 1) for context in (8, 12)]
    assert copies == [("float16", "cuda")] and all(isinstance(m, TorchPrompt) for m in made)
    for role, stream in streams.items():
        prompt = candidates[f"{role} engine"].make(8, 1)
        prompt.prefill()
        assert stream.cache()[1].sum() == 8
    # Whoever is made says the name it was entered under; the speedups go by it.
    found = engine_speed(running, (8, 13))
    speed, notes = found.section, found.notes
    assert speed is not None
    assert {name for name, _, _ in timed(speed)} | {n for n, _ in speed.absent()} == set(candidates)
    assert [(c, p) for c, p, _ in speedups(speed)] == [(8, "prefill"), (8, "decode")]
    assert notes[0].startswith("The engines are not timed at 13 tokens: they are built for a prefill of 12")
    assert notes[1].startswith("Not timed on the GPU: onnxruntime CUDA, base: ")


@pytest.mark.parametrize(
    ("positions", "steps", "prompts"),
    [
        (None, 100_000, [64, 41, 23]),
        (512, 447, [64, 41, 23]),
        (73, 8, [64, 41, 23]),
        (72, 8, [36, 23, 12]),
        (32, 8, [16, 10, 5]),
        (32, 15, [16, 10, 5]),
    ],
)
def test_prompts_leave_room_for_the_steps(positions: int | None, steps: int, prompts: list[int]) -> None:
    assert fitting_prompts(positions, 1, steps) == prompts
    assert positions is None or 1 + max(prompts) + steps <= positions


@pytest.mark.parametrize(("positions", "steps", "most"), [(512, 448, 447), (512, 10**5, 447), (32, 16, 15)])
def test_steps_that_do_not_fit_are_refused(positions: int, steps: int, most: int) -> None:
    with pytest.raises(InputError, match=f"the model has {positions} positions: ask for {most} or fewer"):
        fitting_prompts(positions, 1, steps)
