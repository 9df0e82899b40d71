"""A rewritten random decoder, held against the float64 oracle in a prefill and in decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.linearize.plan import Plan
from tests.end_to_end.random_decoder_graphs import Pair, Written
from tests.end_to_end.random_decoders import VOCAB, Choices, Weights, forward
from tests.fixtures_graph import pad_left, ragged_rows
from tests.sessions import cpu_session

STEPS = 2


def names_after(c: Choices, graph: Written, kept: Sequence[int]) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Names of the caches that are left: numbers are given anew, other names stay."""
    if c.cache in ("usual", "numbered"):
        return graph.past[: len(kept)], graph.present[: len(kept)]
    return [graph.past[i] for i in kept if graph.past], [graph.present[i] for i in kept if graph.present]


def assert_computes(path: Path, c: Choices, weights: Weights, graph: Written, plan: Plan | None) -> None:
    """The graph at ``path`` gives the oracle's logits and caches, in a prefill and in decode steps."""
    runner = cpu_session(path)
    kept = range(c.layers) if plan is None else plan.attention_layers
    past_names, present_names = names_after(c, graph, kept)
    inputs, outputs = ([v.name for v in values] for values in (runner.get_inputs(), runner.get_outputs()))
    ordinary = {"input_ids", "attention_mask", "position_ids"}
    assert set(inputs) - ordinary == {name for pair in past_names for name in pair}
    assert set(outputs) == {"logits", *(name for pair in present_names for name in pair)}
    # Padding on the left moves positions that are counted; GroupQueryAttention has it on the right.
    ragged = c.positions == "input" and c.attention != "GroupQueryAttention"
    rows = ragged_rows((9, 6, 11) if ragged else (9, 9), VOCAB, seed=3)
    traces = [forward(c, weights.stored(), row, plan) for row in rows]
    ids, mask, positions = pad_left([row[: len(row) - STEPS] for row in rows])
    empty = np.zeros((len(rows), c.kv_heads, 0, c.head_size), dtype=np.float32)
    past = {name: empty for pair in past_names for name in pair}
    for step in range(STEPS + 1 if c.cache != "none" else 1):
        if step:
            ids = np.array([[row[len(row) - STEPS + step - 1]] for row in rows], dtype=np.int64)
            mask, positions = np.c_[mask, np.ones_like(ids)], positions[:, -1:] + 1
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        found = dict(zip(outputs, runner.run(None, {n: feeds[n] for n in inputs}), strict=True))
        past = {
            old: found[new]
            for before, after in zip(past_names, present_names, strict=True)
            for old, new in zip(before, after, strict=True)
        }
        for number, (row, trace) in enumerate(zip(rows, traces, strict=True)):
            stop = len(row) - STEPS + step
            start = stop - 1 if step else 0
            assert_near(found["logits"][number, start - stop :], trace.logits[start:stop])
            for layer, pair in zip(kept, present_names, strict=False):
                for name, expected in zip(pair, (trace.keys[layer], trace.values[layer]), strict=True):
                    assert expected is not None
                    assert_near(found[name][number][:, -stop:], expected[:, :stop])


def assert_near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
