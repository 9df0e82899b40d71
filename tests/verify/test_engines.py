"""Built engines in the report, and the race against everything else. No time is asserted but scripted ones."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from nbl_export.engine.gpu import Gpu
from nbl_export.engine.pair import EngineFile
from nbl_export.engine.profiles import Limits
from nbl_export.errors import NblError
from nbl_export.report.tables import engine_speed_table
from nbl_export.runtime import ort as ort_module
from nbl_export.runtime.tensorrt import EngineStream
from nbl_export.verify import engines as module
from nbl_export.verify.engines import (
    Latency,
    built_check,
    gpu_entrants,
    laps,
    measure_engine_speed,
    not_run,
    speedups,
)
from nbl_export.verify.speed import race as race_module
from nbl_export.verify.speed.candidates import CUDA, TIMED_STEPS, EngineContender, OrtEntrant, TorchContender
from nbl_export.verify.speed.race import Rounds, race
from tests.runtime.fake_tensorrt import FakeEngine, Graphs, graphs_of, loaded_engine, manifest_of

L4 = Gpu("NVIDIA L4", "8.9")
ALL = (0, 1, 2, 3, 4)
ROOM = Limits(max_batch=2, max_seq=12, max_context=12 + TIMED_STEPS)


@pytest.fixture(scope="module")
def graphs(stories_model: Any, stories_out: Path) -> Graphs:
    return graphs_of(stories_model, stories_out)


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


class Scripted:
    """A contender whose every call takes the next of its seconds on a clock of the test's own."""

    def __init__(
        self, name: str, clock: list[float], log: list[str], seconds: Callable[[int], float]
    ) -> None:
        self.name, self._clock, self._log, self._seconds, self.calls = name, clock, log, seconds, 0
        self.times: dict[str, list[float]] = {"prefill": [], "step": []}
        self.prefill, self.step = (functools.partial(self._take, what) for what in self.times)

    def _take(self, what: str) -> None:
        self._log.append(f"{self.name} {what}")
        seconds = self._seconds(self.calls)
        self.calls += 1
        self._clock[0] += seconds
        self.times[what].append(seconds)

    def memory_bytes(self) -> int:
        return 1000 + len(self.name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    fake = types.SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda _: None)
    monkeypatch.setattr(race_module, "time", fake)
    return now


def quantile(values: Sequence[float], q: float) -> float:
    """Between the two nearest in order, by hand."""
    ordered, place = sorted(values), q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_a_race_by_hand(clock: list[float]) -> None:
    log: list[str] = []
    numbers = np.random.default_rng(3).uniform(1e-3, 9e-3, 1000)
    # The warm-up takes a thousand times as long, which nothing may show.
    seconds = [
        lambda n, o=o: float(numbers[n + o]) * (1000 if n <= TIMED_STEPS else 1) for o in (0, 300, 600)
    ]
    contenders = {n: Scripted(n, clock, log, s) for n, s in zip("abc", seconds, strict=True)}
    speed = measure_engine_speed(L4, {n: lambda *_, c=c: c for n, c in contenders.items()}, (64,), 4)
    assert log == [line for t in "abc" * 5 for line in (f"{t} prefill", *[f"{t} step"] * TIMED_STEPS)]
    found = speed.latencies
    assert [x.name for x in found] == ["a", "b", "c"] and {x.context for x in found} == {64}
    for contender, latency in zip(contenders.values(), found, strict=True):
        prefill, step = contender.times["prefill"][1:], contender.times["step"][TIMED_STEPS:]
        assert len(prefill) == 4 and len(step) == 4 * TIMED_STEPS
        assert latency.prefill_ms == pytest.approx(1e3 * (sorted(prefill)[1] + sorted(prefill)[2]) / 2)
        assert latency.prefill_p99_ms == pytest.approx(1e3 * quantile(prefill, 0.99))
        assert latency.decode_ms == pytest.approx(1e3 * quantile(step, 0.5))
        assert latency.decode_p99_ms == pytest.approx(1e3 * quantile(step, 0.99))
        assert latency.tokens_per_second == pytest.approx(1 / quantile(step, 0.5))
        assert latency.memory_bytes == 1001


def latency(name: str, context: int, prefill: float, decode: float) -> Latency:
    return Latency(name, context, prefill, 99.0, decode, 99.0, 1e3 / decode, 0)


def test_speedups_by_hand() -> None:
    found = speedups(
        [
            latency("new", 512, 4.0, 0.5),
            latency("old", 512, 10.0, 0.75),
            latency("other", 512, 1.0, 1.0),
            latency("old", 64, 3.0, 0.2),
            latency("new", 64, 6.0, 0.1),
            latency("old", 128, 3.0, 0.2),  # the other could not take part
        ],
        "old",
        "new",
    )
    assert found == (
        {"context": 64.0, "prefill": 0.5, "decode": 2.0},
        {"context": 512.0, "prefill": 2.5, "decode": 1.5},
    )


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
    entrants: dict[str, Callable[[int, int], Any]] = {
        "onnxruntime CUDA, base": raising(error),
        "base engine": lambda *_: Scripted("base engine", clock, log, lambda n: 0.004),
        "linearized engine": lambda *_: Scripted("linearized engine", clock, log, lambda n: 0.001),
    }
    speed = measure_engine_speed(L4, entrants, (8, 32), 3)
    assert list(speed.absent) == ["onnxruntime CUDA, base"]
    reason = speed.absent["onnxruntime CUDA, base"]
    assert reason and "\n" not in reason and str(error).partition("\n")[0] in reason
    assert [(x.name, x.context) for x in speed.latencies] == [
        (name, context) for context in (8, 32) for name in ("base engine", "linearized engine")
    ]
    assert [s["context"] for s in speed.speedups] == [8, 32]
    assert all(s["prefill"] == s["decode"] == pytest.approx(4) for s in speed.speedups)
    assert (speed.gpu, speed.compute_capability, speed.rounds) == ("NVIDIA L4", "8.9", 3)
    table = engine_speed_table(speed.as_json())
    assert len(table.rows) == 4 and "32 tokens 4.00× prefill, 4.00× decode" in str(table.note)


@pytest.mark.parametrize("at", [0, 1, TIMED_STEPS + 4], ids=["prefill", "step", "later round"])
def test_who_finds_no_room_while_running_is_left_out_too(clock: list[float], at: int) -> None:
    """An engine allocates its cache in the first prefill, eager PyTorch its activations."""

    def full(call: int) -> float:
        if call == at:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
        return 0.5

    log: list[str] = []
    entrants: dict[str, Callable[[int, int], Any]] = {
        "base engine": lambda *_: Scripted("base engine", clock, [], lambda n: 0.004),
        "linearized engine": lambda c, _: Scripted(
            "linearized engine", clock, [], full if c == 8 else lambda n: 1
        ),
        "another": lambda *_: Scripted("another", clock, log, lambda n: 0.002),
    }
    speed = measure_engine_speed(L4, entrants, (8, 16), 3)
    found = {(x.name, x.context): x for x in speed.latencies}
    assert found.keys() == {(name, c) for name in entrants for c in (8, 16)} - {("linearized engine", 8)}
    assert speed.absent == {"linearized engine": "CUDA out of memory."}
    assert [s["context"] for s in speed.speedups] == [16] and log.count("another prefill") == 2 * 4
    for context in (8, 16):
        assert found["base engine", context].decode_ms == pytest.approx(4)
        assert found["another", context].prefill_p99_ms == pytest.approx(2)
    with pytest.raises(torch.OutOfMemoryError):
        race({"linearized engine": entrants["linearized engine"](8, 1)}, laps, Rounds(3, 3), lambda _: None)


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
    speed = measure_engine_speed(L4, {"ort": OrtEntrant(graphs("static"))}, (8,), 3)
    assert not speed.latencies and "bfloat16" in speed.absent["ort"]


# contenders on the CPU ---------------------------------------------------------------------------


def cached(model: Any, tokens: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values [heads, tokens, head_dim] of each layer, by transformers."""
    with torch.inference_mode():
        cache = model(torch.tensor([list(tokens)]), use_cache=True).past_key_values
    return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in cache.layers]


@pytest.mark.parametrize("form", ["static", "concat"])
def test_an_engine_really_fills_its_cache_and_advances(graphs: Graphs, form: str) -> None:
    stream = EngineStream(loaded_engine(graphs(form), ROOM))
    contender = EngineContender(stream, 12)
    for steps in (TIMED_STEPS, 3):  # to the end of the context, and anew from an empty cache
        contender.prefill()
        for _ in range(steps):
            contender.step()
        pairs, real = stream.cache()
        assert real.sum() == 12 + steps
        for pair, expected in zip(pairs, cached(graphs.model, [*range(12), *[1] * steps]), strict=True):
            for side, wanted in zip(pair, expected, strict=True):
                np.testing.assert_allclose(side[0][:, real[0]], wanted, rtol=0, atol=1e-4)
    assert contender.memory_bytes() == stream.cache_bytes + 2 * FakeEngine.device_memory_size_v2


def test_no_timed_step_records_a_graph(graphs: Graphs) -> None:
    """Recording takes far longer than a step: it belongs to the warm-up, or the 99th percentile is its time."""
    loaded = loaded_engine(graphs("static"), ROOM)
    race({"base engine": EngineContender(EngineStream(loaded), 12)}, laps, Rounds(3, 3), lambda _: None)
    events = loaded.device.events  # type: ignore[attr-defined]
    assert events.count("replay") > 0
    second = [i for i, event in enumerate(events) if event == ("run", "prefill")][1]
    assert ("capture", "decode") in events[:second]
    assert ("capture", "decode") not in events[second:]


def test_pytorch_begins_anew_and_advances(stories_model: Any) -> None:
    stories_model.set_attn_implementation("sdpa")
    contender = TorchContender(stories_model, 12)
    for steps in (5, 2):
        contender.prefill()
        for _ in range(steps):
            contender.step()
        expected = cached(stories_model, [*range(12), *[0] * steps])
        for layer, (keys, values) in zip(contender._cache.layers, expected, strict=True):
            np.testing.assert_allclose(layer.keys[0].numpy(), keys, rtol=0, atol=1e-4)
            np.testing.assert_allclose(layer.values[0].numpy(), values, rtol=0, atol=1e-4)
        assert contender.memory_bytes() == 2 * 5 * 4 * (12 + steps) * 8 * 4


@pytest.mark.parametrize("form", ["static", "concat"])
@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2)])
def test_onnxruntime_fills_its_cache(graphs: Graphs, form: str, precision: str, size: int) -> None:
    contender = OrtEntrant(graphs(form, precision, (0, 3)))(12)
    contender.prefill()
    for _ in range(3):
        contender.step()
    places = 12 + TIMED_STEPS if form == "static" else 12
    assert contender.memory_bytes() == 2 * 3 * 4 * places * 8 * size
    filled = contender.past["past_key_values.2.key"].numpy()
    assert filled.shape == (1, 4, places, 8) and filled.dtype.itemsize == size
    assert np.abs(filled[0, :, :12]).min(axis=(0, 2)).max() > 0


def test_a_missing_provider_is_named(graphs: Graphs) -> None:
    with pytest.raises(NblError, match=r"^onnxruntime has no CUDAExecutionProvider here$"):
        OrtEntrant(graphs("static"), CUDA)(12)


def test_who_takes_part_on_a_gpu(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[tuple[str, str]] = []

    def in_precision(model: Any, dtype: str) -> Any:
        assert model is graphs.model
        return types.SimpleNamespace(to=lambda device: copies.append((dtype, device)) or model)

    monkeypatch.setattr(module, "in_precision", in_precision)
    paths = {"base": graphs("static"), "linearized": graphs("static", "fp32", (0, 3))}
    streams = {role: EngineStream(loaded_engine(path, ROOM)) for role, path in paths.items()}
    entrants = gpu_entrants(graphs.model, streams, paths, "fp16")
    assert list(entrants) == [
        "base engine",
        "linearized engine",
        "onnxruntime CUDA, base",
        "onnxruntime CUDA, linearized",
        "PyTorch eager, base",
    ]
    assert copies == []
    made = [entrants["PyTorch eager, base"](context) for context in (8, 12)]
    assert copies == [("float16", "cuda")] and all(isinstance(m, TorchContender) for m in made)
    for role, stream in streams.items():
        contender = entrants[f"{role} engine"](8)
        contender.prefill()
        assert stream.cache()[1].sum() == 8
    # Whoever is made says the name it was entered under; the speedups go by it.
    speed = measure_engine_speed(L4, entrants, (8,), 3)
    assert {x.name for x in speed.latencies} | set(speed.absent) == set(entrants)
    assert [s["context"] for s in speed.speedups] == [8]
