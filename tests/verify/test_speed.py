"""Speed: what is timed and how the figures are put together. No time is asserted."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.runtime.ort import OrtDecoder
from nbl_export.runtime.prompts import OrtPrompt, timed_row
from nbl_export.verify import speed as speed_module
from nbl_export.verify.ceiling import graph_cost
from nbl_export.verify.speed import _cell, _decode, _interleaved, measure_speed


def test_structure_of_a_measurement(stories_out: Path) -> None:
    base, linear = stories_out / "baseline" / "model.onnx", stories_out / "model.onnx"
    speed = measure_speed(base, linear, (8, 20), 3)
    assert speed.rounds == 3 and speed.provider == "CPUExecutionProvider"
    assert [(c.phase, c.context) for c in speed.cells] == [
        ("prefill", 8),
        ("decode", 8),
        ("prefill", 20),
        ("decode", 20),
    ]
    assert (speed.base_cost, speed.linearized_cost) == (graph_cost(base), graph_cost(linear))
    for cell in speed.cells:
        for timing in (cell.base, cell.linearized):
            assert 0 < timing.low_ms <= timing.median_ms <= timing.high_ms
        assert 0 < cell.speedup_low <= cell.speedup <= cell.speedup_high
        assert cell.resolved == (cell.speedup_low > 1 or cell.speedup_high < 1)
        costs = [
            c.prefill_macs(cell.context) if cell.phase == "prefill" else c.decode_bytes(cell.context)
            for c in (speed.base_cost, speed.linearized_cost)
        ]
        assert cell.ceiling == costs[0] / costs[1] > 1
    raw = speed.as_json()
    assert len(raw["cells"]) == 4 and raw["cells"][1]["phase"] == "decode"


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
    assert prompt.cache_bytes == 6 * 4 * context * 8 * 4
    prompt.step()


def test_rounds_alternate_and_the_first_is_thrown_away() -> None:
    order: list[int] = []

    def run(which: Any) -> float:
        order.append(which)
        return float(10 * len(order) + which)

    done: list[int] = []
    times = _interleaved([0, 1], run, 3, done.append)  # type: ignore[list-item]
    assert len(order) == 8 and len(done) == 4
    pairs = [order[i : i + 2] for i in range(0, 8, 2)]
    assert all(sorted(pair) == [0, 1] for pair in pairs)
    assert all(a != b for a, b in pairwise(pairs))
    # Eight runs, numbered from 1; the first two warm up.
    assert [len(t) for t in times] == [3, 3]
    for which in (0, 1):
        assert times[which] == [10 * (i + 1) + which for i, w in enumerate(order) if i >= 2 and w == which]


def test_a_cell_by_hand() -> None:
    cell = _cell("decode", 16, [[0.004, 0.006, 0.008], [0.002, 0.002, 0.002]], 2.5)
    assert (cell.base.median_ms, cell.base.low_ms, cell.base.high_ms) == (6, 5, 7)
    assert cell.linearized.median_ms == 2
    # The ratios are 2, 3 and 4.
    assert (cell.speedup_low, cell.speedup, cell.speedup_high) == pytest.approx((2.5, 3, 3.5))
    assert cell.resolved and cell.ceiling == 2.5
    slower = _cell("decode", 16, [[0.001] * 3, [0.002] * 3], 2.5)
    assert slower.speedup == pytest.approx(0.5) and slower.resolved
    noisy = _cell("decode", 16, [[0.001, 0.002, 0.003], [0.002] * 3], 2.5)
    assert noisy.speedup == pytest.approx(1) and not noisy.resolved


def test_a_decode_round_times_one_token(monkeypatch: pytest.MonkeyPatch, stories_out: Path) -> None:
    prompt = OrtPrompt(OrtDecoder(stories_out / "model.onnx"), 4, 4)
    prompt.prefill()
    clock = iter([100.0, 100.0 + 8.0])
    monkeypatch.setattr(speed_module.time, "perf_counter", lambda: next(clock))
    assert _decode(prompt) == 8.0 / speed_module._DECODE_STEPS
