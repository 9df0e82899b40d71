"""Speed: what is timed and how the figures are put together. No time is asserted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.graph.cache import kv_bytes_per_token
from nbl_export.graph.io import load_graph
from nbl_export.records import from_json, to_json
from nbl_export.runtime import session as sessions
from nbl_export.runtime.ort import OrtDecoder
from nbl_export.runtime.session import session_bytes
from nbl_export.verify.speed import candidates
from nbl_export.verify.speed import race as race_module
from nbl_export.verify.speed.candidates import OrtPrompt, timed_row
from nbl_export.verify.speed.ceiling import graph_cost
from nbl_export.verify.speed.pair import Pair, anew_or_why_not, measure_speed, phases_of
from nbl_export.verify.speed.values import Speed


def test_structure_of_a_measurement(pair: Pair) -> None:
    speed = measure_speed(pair, (8, 20), 3)
    assert speed.rounds == 3 and speed.machine.device == "CPUExecutionProvider" and speed.machine.threads
    assert [(c.phase, c.batch, c.context) for c in speed.cells] == [
        ("prefill", 1, 8),
        ("decode", 1, 8),
        ("prefill", 1, 20),
        ("decode", 1, 20),
    ]
    costs = graph_cost(pair.base), graph_cost(pair.linearized)
    assert [(c.name, c.base, c.cost) for c in speed.candidates] == [
        ("base", None, costs[0]),
        ("linearized", "base", costs[1]),
    ]
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
    raw = to_json(speed)
    assert len(raw["cells"]) == 4 and raw["cells"][1]["phase"] == "decode"
    assert from_json(Speed, raw, "it", "do it again") == speed


def test_without_a_cache_there_is_no_decode(pair: Pair) -> None:
    cost = graph_cost(pair.base)
    assert cost.kv_bytes_per_token == kv_bytes_per_token(load_graph(pair.base)) > 0
    assert phases_of(cost) == ("prefill", "decode")
    assert phases_of(replace(cost, kv_bytes_per_token=0)) == ("prefill",)


@pytest.mark.parametrize("context", [2, 8])
def test_decode_reads_a_really_filled_cache(stories_out: Path, context: int) -> None:
    decoder = OrtDecoder(stories_out / "model.onnx")
    prompt = OrtPrompt(decoder, context, 4)
    assert not prompt.past
    prompt.prefill()
    assert {name: tuple(value.shape()) for name, value in prompt.past.items()} == {
        f"past_key_values.{n}.{s}": (1, 4, context, 8) for n in range(3) for s in ("key", "value")
    }
    assert {name: array.shape for name, array in prompt.step_inputs.items()} == {
        "input_ids": (1, 1),
        "attention_mask": (1, context + 1),
        "position_ids": (1, 1),
        "num_logits_to_keep": (),
    }
    assert prompt.step_inputs["position_ids"].tolist() == [[context]]
    # The cache is the one that the timed prompt leaves behind.
    ids = timed_row(context).astype(np.int64)[None]
    positions = np.arange(context)[None]
    expected = decoder(ids, np.ones_like(ids), positions, decoder.empty_past(1)).present
    for n, pair in enumerate(expected):
        for name, tensor in zip(("key", "value"), pair, strict=True):
            found = prompt.past[f"past_key_values.{n}.{name}"].numpy()
            np.testing.assert_allclose(found, tensor, rtol=0, atol=1e-6)
            assert np.abs(found).min(axis=(1, 3)).max() > 0
    assert prompt.memory_bytes() == 6 * 4 * context * 8 * 4
    prompt.step()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have rounds take so many seconds."""

    def script(prefill: Callable[[Any], float], decode: Callable[[Any], float]) -> None:
        monkeypatch.setattr(race_module, "prefill_seconds", lambda prompt: (prefill(prompt),))
        monkeypatch.setattr(race_module, "decode_seconds", lambda prompt, _steps: (decode(prompt),))

    return script


def is_base(prompt: Any) -> bool:
    """Of stories260K with two linear layers."""
    return len(prompt.model.past_names) > 6


def test_a_cell_by_hand(pair: Pair, scripted: Callable[..., None]) -> None:
    seconds = iter([0.0, *(0.004, 0.006, 0.008) * 2])
    scripted(lambda _: 1.0, lambda p: next(seconds) if is_base(p) else 0.002)
    cell = measure_speed(pair, (16,), 6).cells[1]
    base, linearized = cell.results
    assert (base.timing.median_ms, base.timing.low_ms, base.timing.high_ms) == (6, 4.5, 7.5)
    assert linearized.timing.median_ms == 2
    # The ratios are 2, 3 and 4, each twice.
    found = linearized.over_base
    assert found and (found.low, found.value, found.high) == pytest.approx((2.25, 3, 3.75))
    assert (found.least, found.most) == pytest.approx((2, 4))
    assert found.resolved and linearized.rounds == 6
    assert base.linearized_over == found and base.over_base is None


def test_rounds_are_added_where_nothing_can_be_said(pair: Pair, scripted: Callable[..., None]) -> None:
    calls = iter(range(100))
    # Base and linearized in turn: as fast as each other, now the one and now the other a little faster.
    scripted(lambda _: (1.0, 1.1, 1.1, 1.0)[next(calls) % 4], lambda p: 1.0 + is_base(p) * 0.5)
    (_, prefill, a), (_, decode, b) = measure_speed(pair, (8,), 3).speedups()
    assert (prefill.rounds, a.resolved) == (9, False)
    assert (decode.rounds, b.resolved, b.value) == (6, True, 1.5)


@pytest.mark.parametrize(("times", "how"), [(2.3, False), (1.5, True), (0.5, "skipped")])
def test_sessions_are_both_there_or_take_turns_or_are_not_made(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, times: float, how: bool | str
) -> None:
    """By what is free, in units of the larger session."""
    largest = max(session_bytes(path) for path in (pair.base, pair.linearized))
    monkeypatch.setattr(sessions, "free_memory", lambda: int(times * largest))
    found = anew_or_why_not(pair.base, pair.linearized)
    assert found is how or (how == "skipped" and "a session needs about" in str(found))


def test_in_turns_one_session_is_there_at_a_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
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
    speed = measure_speed(pair, (8,), 3, anew=True)
    assert most == 1 and made >= 2 * 2 * 4  # two graphs, two phases, three rounds and one before them
    assert [(c.phase, [r.name for r in c.results]) for c in speed.cells] == [
        ("prefill", ["base", "linearized"]),
        ("decode", ["base", "linearized"]),
    ]
    assert all(r.cache_bytes > 0 for r in speed.cells[1].results)
