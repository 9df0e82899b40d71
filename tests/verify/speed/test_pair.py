"""Speed of two engine_graphs, and milliseconds of workloads: what is timed and put together. No time is asserted."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.engine.manifest import Limits
from nbl_export.linearize.plan import Plan
from nbl_export.runtime import session as sessions
from nbl_export.runtime.ort import OrtModel
from nbl_export.runtime.session import session_bytes
from nbl_export.settings.making import Workload
from nbl_export.verify.speed import candidates
from nbl_export.verify.speed import pair as module
from nbl_export.verify.speed.candidates import (
    TIMED_STEPS,
    Candidate,
    OrtPrompt,
    StreamPrompt,
    timed_row,
)
from nbl_export.verify.speed.ceiling import graph_cost
from nbl_export.verify.speed.pair import TorchPrompt, anew_or_why_not, measure_speed, workload_ms
from nbl_export.verify.speed.race import DECODE_STEPS, Harness, Rounds, decode_seconds, prefill_seconds, race
from nbl_export.verify.speed.values import Machine, Roofline
from tests.finished import Graphs
from tests.fixtures_graph import maps_in_place, plan_by_hand
from tests.runtime.fake_tensorrt import FakeEngine, loaded_engine
from tests.runtime.test_stream import torch_cache
from tests.verify.speed.test_race import Timed


def test_structure_of_a_measurement(pair: tuple[Path, Path]) -> None:
    speed = measure_speed(*pair, (8, 20), 3)
    assert speed.rounds == 3 and speed.machine.device == "CPUExecutionProvider" and speed.machine.threads
    assert [(c.phase, c.batch, c.context) for c in speed.cells] == [
        ("prefill", 1, 8),
        ("decode", 1, 8),
        ("prefill", 1, 20),
        ("decode", 1, 20),
    ]
    costs = tuple(map(graph_cost, pair))
    assert [c.cost for c in speed.candidates] == list(costs)
    assert len(speed.speedups()) == 4 and speed.machine.roofline is not None
    for cell, result, over in speed.speedups():
        for one in cell.results:
            assert 0 < one.timing.low_ms <= one.timing.median_ms <= one.timing.high_ms
        assert 0 < over.low <= over.value <= over.high
        assert over.least <= over.value <= over.most
        if over.resolved:
            assert over.least > 1 or over.most < 1
        # Fewer than six rounds never resolve anything.
        assert 6 <= result.rounds <= 9 and (over.resolved or result.rounds == 9)
        times = [speed.machine.roofline.seconds(c.work(cell.phase, cell.context)) for c in costs]
        assert result.ceiling == times[0] / times[1] > 1


@pytest.mark.parametrize(("times", "how"), [(2.3, False), (1.5, True), (0.5, "skipped")])
def test_sessions_are_both_there_or_take_turns_or_are_not_made(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, times: float, how: bool | str
) -> None:
    """By what is free, in units of the larger session."""
    largest = max(session_bytes(path) for path in pair)
    monkeypatch.setattr(sessions, "free_memory", lambda: int(times * largest))
    found = anew_or_why_not(*pair)
    assert found is how or (how == "skipped" and "a session needs about" in str(found))


def test_in_turns_one_session_is_there_at_a_time(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = made = 0
    real = candidates.OrtModel

    def model(*args: Any, **others: Any) -> Any:
        nonlocal most, made
        one = real(*args, **others)
        alive.add(one)
        made, most = made + 1, max(most, len(alive))
        return one

    monkeypatch.setattr(candidates, "OrtModel", model)
    speed = measure_speed(*pair, (8,), 3, anew=True)
    assert most == 1 and made >= 2 * 2 * 4  # two engine_graphs, two phases, three rounds and one before them
    assert [(c.phase, [r.name for r in c.results]) for c in speed.cells] == [
        ("prefill", ["base", "linearized"]),
        ("decode", ["base", "linearized"]),
    ]
    assert all(r.cache_bytes > 0 for r in speed.cells[1].results)


MACHINE = Machine("cpu", 1, roofline=Roofline("cpu", "float32", 1, 1e9, 1e9))


@pytest.fixture
def asked(told: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[tuple[int, int]]]]:
    """Graphs by name that take as many times as long as their name says; what was raced of them."""
    cells: list[tuple[str, Sequence[tuple[int, int]]]] = []
    measure = Harness.measure

    def measured(self: Harness, wanted: Sequence[tuple[int, int]], listener: Any = None) -> Any:
        cells.append((self.phases[0], wanted))
        return measure(self, wanted, listener)

    def candidate(name: str, path: Path, base: str | None = None, **_: Any) -> Candidate:
        return Candidate(
            name,
            lambda context, batch=1: Timed(float(path.name) * context * batch, float(path.name) * batch),
            base,
        )

    monkeypatch.setattr(Harness, "measure", measured)
    monkeypatch.setattr(module, "graph_candidate", candidate)
    monkeypatch.setattr(module, "cpu_machine", lambda: MACHINE)
    return cells


def test_milliseconds_by_hand(asked: list[Any]) -> None:
    works = [Workload(prefill=10), Workload(prefill=20, decode=4, context=100, batch=2, weight=3)]
    found = workload_ms(Path("2"), Path("1"), works)
    # 10 tokens; three times two rows of 20, and of 4 tokens one by one.
    each = 1e3 * (10 + 3 * (2 * 20 + 4 * 2))
    assert found == (pytest.approx(2 * each), pytest.approx(each))
    assert asked == [("prefill", [(1, 10), (2, 20)]), ("decode", [(2, 102)])]


LIMITS = Limits(max_batch=2, max_seq=12, max_context=12 + TIMED_STEPS)


@pytest.mark.parametrize("form", ["static", "concat"])
def test_an_engine_really_fills_its_cache_and_advances(engine_graphs: Graphs, form: str) -> None:
    stream = loaded_engine(engine_graphs(form), LIMITS)
    prompt = StreamPrompt(stream, 12)
    for steps in (TIMED_STEPS, 3):  # to the end of the context, and anew from an empty cache
        prompt.prefill()
        for _ in range(steps):
            prompt.step()
        pairs, real = stream.cache()
        assert real.sum() == 12 + steps
        for pair, expected in zip(
            pairs, torch_cache(engine_graphs.model, np.array([*range(12), *[1] * steps])), strict=True
        ):
            for side, wanted in zip(pair, expected, strict=True):
                np.testing.assert_allclose(side[0][:, real[0]], wanted, rtol=0, atol=1e-4)
    assert prompt.memory_bytes() > 2 * FakeEngine.device_memory_size_v2


def test_no_timed_step_records_a_graph(engine_graphs: Graphs) -> None:
    """Recording takes far longer than a step: it belongs to the warm-up, or the 99th percentile is its time."""
    loaded = loaded_engine(engine_graphs("static"), LIMITS)
    prompt = StreamPrompt(loaded, 12)
    race({"base engine": prompt}, decode_seconds, Rounds(3, 3), lambda _: None)
    events = loaded.device.events  # type: ignore[attr-defined]
    assert events.count("replay") > 0
    second = [i for i, event in enumerate(events) if event == ("run", "prefill")][1]
    assert ("capture", "decode") in events[:second]
    assert ("capture", "decode") not in events[second:]


def test_a_round_of_decode_is_some_steps_after_the_prompt(clock: list[float]) -> None:
    log: list[str] = []

    def took(what: str) -> None:
        clock[0] += len(log)
        log.append(what)

    calls = {name: functools.partial(took, name) for name in ("prefill", "rewind", "step")}
    prompt: Any = types.SimpleNamespace(**calls)
    assert decode_seconds(prompt) == pytest.approx(tuple(range(2, 2 + DECODE_STEPS)))
    assert log == ["rewind", *["step"] * (1 + DECODE_STEPS)]
    log.clear()
    assert len(prefill_seconds(prompt)) == 1 and log == ["prefill"]


def test_pytorch_begins_anew_and_advances(stories_model: Any) -> None:
    stories_model.set_attn_implementation("sdpa")
    prompt = TorchPrompt(stories_model, 12)
    for steps in (5, 2):
        prompt.prefill()
        for _ in range(steps):
            prompt.step()
        expected = torch_cache(stories_model, np.array([*range(12), *[0] * steps]))
        for layer, (keys, values) in zip(prompt._cache.layers, expected, strict=True):
            np.testing.assert_allclose(layer.keys[0].numpy(), keys, rtol=0, atol=1e-4)
            np.testing.assert_allclose(layer.values[0].numpy(), values, rtol=0, atol=1e-4)
        assert prompt.memory_bytes() == 2 * 5 * 4 * (12 + steps) * 8 * 4


CONTEXT, ROOM = 11, 3


ALL = (0, 1, 2, 3, 4)


IN_PLACE = ("static", "shared")


def prompt_of(path: Path, context: int = CONTEXT, room: int = ROOM) -> OrtPrompt:
    return OrtPrompt(OrtModel(path, rounded=False), context, room=room)


def expected(model: Any, plan: Plan, tokens: Sequence[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [tokens, vocab] and the cache of the layers that keep attention, by transformers."""
    with maps_in_place(model, plan), torch.inference_mode():
        output = model(torch.tensor([list(tokens)]), use_cache=True)
    kept = [layer for i, layer in enumerate(output.past_key_values.layers) if i not in plan.layers]
    cache = {
        f"past_key_values.{n}.{side}": getattr(layer, f"{side}s").numpy()
        for n, layer in enumerate(kept)
        for side in ("key", "value")
    }
    return output.logits[0].numpy(), cache


def logits(binding: Any) -> np.ndarray:
    return binding.get_outputs()[0].numpy().copy()


def contents(prompt: OrtPrompt) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in prompt.past.items()}


@pytest.mark.parametrize(
    ("form", "layers"), [("static", (0, 3)), ("shared", ()), ("concat", (0, 3)), ("concat", ALL)], ids=str
)
def test_prefill_and_step_compute_what_pytorch_does(
    engine_graphs: Graphs, form: str, layers: tuple[int, ...]
) -> None:
    """Again and again: steps write behind the prompt, and the next prefill must not mind."""
    prompt, plan = prompt_of(engine_graphs(form, "fp32", layers)), plan_by_hand(engine_graphs.out, layers)
    wanted, cache = expected(engine_graphs.model, plan, [*timed_row(CONTEXT), 1])
    for _ in range(3):
        prompt.prefill()
        made = logits(prompt._prefill)[0]
        assert len(made) == (CONTEXT if form == "static" else 1)  # no logits that nobody reads
        np.testing.assert_allclose(made, wanted[:-1][-len(made) :], rtol=0, atol=2e-4)
        for _ in range(ROOM + 2):  # the step does not advance, so there is always room
            prompt.step()
            np.testing.assert_allclose(logits(prompt._step)[0], wanted[-1:], rtol=0, atol=2e-4)
        found = contents(prompt)
        assert found.keys() == cache.keys()
        for name, value in cache.items():
            filled = found[name][:, :, :CONTEXT]
            np.testing.assert_allclose(filled, value[:, :, :CONTEXT], rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", IN_PLACE)
def test_one_buffer_is_written_where_it_lies(engine_graphs: Graphs, form: str) -> None:
    prompt = prompt_of(engine_graphs(form))
    prompt.prefill()
    places = {name: value.data_ptr() for name, value in prompt.past.items()}
    before = contents(prompt)
    assert len(places) == len(set(places.values())) == 10 and 0 not in places.values()
    for value in before.values():
        assert value.shape == (1, 4, CONTEXT + ROOM, 8) and not value[:, :, CONTEXT:].any()
    prompt.step()
    after = contents(prompt)
    _, cache = expected(engine_graphs.model, plan_by_hand(engine_graphs.out, ()), [*timed_row(CONTEXT), 1])
    for name, value in after.items():
        # The token's own place has changed, and no other.
        np.testing.assert_allclose(value[:, :, CONTEXT], cache[name][:, :, CONTEXT], rtol=0, atol=2e-4)
        assert np.array_equal(np.delete(value, CONTEXT, axis=2), np.delete(before[name], CONTEXT, axis=2))
    prompt.step()
    prompt.prefill()
    assert {name: value.data_ptr() for name, value in prompt.past.items()} == places
    assert all(np.array_equal(value, after[name]) for name, value in contents(prompt).items())
