"""Speed: what is timed and how the figures are put together. No time is asserted."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from nbl_export.report.page import numeric_columns
from nbl_export.report.speed import speed_tables
from nbl_export.runtime.ort import OrtDecoder
from nbl_export.runtime.prompts import OrtPrompt, timed_row
from nbl_export.verify.speed import pair as speed_module
from nbl_export.verify.speed.ceiling import graph_cost
from nbl_export.verify.speed.checks import speed_check
from nbl_export.verify.speed.pair import explained, measure_speed
from nbl_export.verify.speed.profile import Explanation


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
        assert cell.speedup_least <= cell.speedup <= cell.speedup_most
        if cell.resolved:
            assert cell.speedup_least > 1 or cell.speedup_most < 1
        assert 3 <= cell.rounds <= 9 and (cell.resolved or cell.rounds == 9)
        times = [
            speed.roofline.seconds(c.work(cell.phase, cell.context))
            for c in (speed.base_cost, speed.linearized_cost)
        ]
        assert cell.ceiling == times[0] / times[1] > 1
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
    assert prompt.memory_bytes() == 6 * 4 * context * 8 * 4
    prompt.step()


def test_a_cell_by_hand() -> None:
    found = speed_module.cell("decode", 16, [0.004, 0.006, 0.008], [0.002, 0.002, 0.002], 2.5)
    assert (found.base.median_ms, found.base.low_ms, found.base.high_ms) == (6, 5, 7)
    assert found.linearized.median_ms == 2
    # The ratios are 2, 3 and 4.
    assert (found.speedup_low, found.speedup, found.speedup_high) == pytest.approx((2.5, 3, 3.5))
    assert (found.speedup_least, found.speedup_most) == pytest.approx((2, 4))
    assert found.resolved and found.ceiling == 2.5 and found.rounds == 3


def test_rounds_are_added_where_nothing_can_be_said(
    monkeypatch: pytest.MonkeyPatch, stories_out: Path
) -> None:
    base, linear = stories_out / "baseline" / "model.onnx", stories_out / "model.onnx"
    calls = iter(range(100))
    # Base and linearized in turn: as fast as each other, now the one and now the other a little faster.
    monkeypatch.setattr(speed_module, "prefill_seconds", lambda _: (1.0, 1.1, 1.1, 1.0)[next(calls) % 4])
    monkeypatch.setattr(speed_module, "decode_seconds", lambda c: 1.0 + (len(c.model.past_names) > 6) * 0.5)
    prefill, decode = measure_speed(base, linear, (8,), 3).cells
    assert (prefill.rounds, prefill.resolved) == (9, False)
    assert (decode.rounds, decode.resolved, decode.speedup) == (3, True, 1.5)


def test_what_is_above_its_ceiling_for_sure_is_explained(
    monkeypatch: pytest.MonkeyPatch, stories_out: Path
) -> None:
    base, linear = stories_out / "baseline" / "model.onnx", stories_out / "model.onnx"
    monkeypatch.setattr(speed_module, "prefill_seconds", lambda _: 1.0)
    monkeypatch.setattr(speed_module, "decode_seconds", lambda c: 2.0 if len(c.model.past_names) > 6 else 0.1)
    speed = measure_speed(base, linear, (8,), 3)
    prefill, decode = explained(speed, base, linear).cells
    assert prefill == speed.cells[0] and prefill.explanation is None
    found = decode.explanation
    assert found and found.base_nodes > found.linearized_nodes and found.by_operator_ms
    assert (found.saved_ms, decode.base.median_ms) == (pytest.approx(1900), 2000)
    assert found.excess_ms == pytest.approx(2000 / decode.ceiling - 100)


def test_a_suspect_cell_leaves_the_check_open(stories_out: Path) -> None:
    base, linear = stories_out / "baseline" / "model.onnx", stories_out / "model.onnx"
    speed = measure_speed(base, linear, (8,), 3)
    good = Explanation(9, 8, {"Add": 1.0}, 3.0, 1.0, 3.0, False)
    raw = {**speed.as_json(), "cells": [asdict(replace(c, explanation=good)) for c in speed.cells]}
    assert speed_check(raw).status == "passed"
    table, why = speed_tables(raw)
    assert not any("suspect" in row[-1] for row in table.rows) and len(why.rows) == 2
    bad = replace(good, gone_ms=1.0, suspect=True)
    raw["cells"] = [asdict(replace(c, explanation=bad if c.phase == "decode" else None)) for c in speed.cells]
    check = speed_check(raw)
    assert check.status == "skipped" and check.detail.startswith(
        "decode 8, linearized: 3.00 ms saved at least"
    )
    (table,) = speed_tables(raw, brief=True)
    assert [row[-1].endswith("× suspect") for row in table.rows] == [False, True]
    assert numeric_columns(table) >= {5}
    # A report of an earlier version knows of no reasons.
    for cell in raw["cells"]:
        del cell["explanation"]
    assert speed_check(raw).status == "passed" and len(speed_tables(raw)) == 1
