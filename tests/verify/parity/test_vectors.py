"""Figures of vectors by hand, and an encoder's outputs held to their gates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from nbl_export.verify.parity.figures import Figures, Gates, gates_for
from nbl_export.verify.parity.vectors import compare_batches, compare_vectors, log_softmax

GATES = gates_for("float32")


def one_token(a: list[float], b: list[float]) -> Figures:
    return compare_vectors(np.array([a], dtype=np.float32), np.array([b], dtype=np.float32), GATES.near_tie)


def test_logit_figures_by_hand() -> None:
    """softmax(0, ln 3) = (1/4, 3/4) against softmax(ln 3, 0) = (3/4, 1/4)."""
    ln3 = math.log(3)
    step = one_token([0, ln3], [ln3, 0])
    assert step.tokens == 1
    assert step.max_abs == step.mean_abs == step.p99_abs == pytest.approx(ln3, rel=1e-6)
    # Relative to max(|a|, rms of a) with rms = ln 3 / √2: once √2, once 1.
    assert step.max_rel == pytest.approx(math.sqrt(2), rel=1e-6)
    assert step.mean_rel == pytest.approx((math.sqrt(2) + 1) / 2, rel=1e-6)
    assert step.p99_rel == pytest.approx(1 + 0.99 * (math.sqrt(2) - 1), rel=1e-6)
    assert step.min_cosine == pytest.approx(0, abs=1e-7)
    assert step.max_kl == pytest.approx(ln3 / 2, rel=1e-6)
    assert step.top1 == 0 and step.near_ties == 0


def test_kl_is_from_the_reference() -> None:
    """KL((1/2, 1/2) ‖ (1/4, 3/4)) is not the divergence the other way round."""
    step = one_token([1, 1], [0, math.log(3)])
    assert step.max_kl == pytest.approx(0.5 * math.log(4 / 3), rel=1e-6)
    other = one_token([0, math.log(3)], [1, 1])
    assert other.max_kl == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2), rel=1e-6)


@pytest.mark.parametrize(
    ("gap", "top1", "ties"), [(0.0019, 1.0, 1), (0.0021, 0.0, 0)], ids=["near-tie", "no near-tie"]
)
def test_near_ties_are_not_counted_against_the_graph(gap: float, top1: float, ties: int) -> None:
    assert GATES.near_tie == 2e-3
    step = one_token([1, 1 + gap, 0], [1 + gap, 1, 0])
    assert (step.top1, step.near_ties) == (top1, ties)
    # It is the reference that must be undecided, not the candidate.
    assert one_token([1, 1.5, 0], [1.0005, 1, 0]).top1 == 0
    # Agreement is agreement, however close.
    assert one_token([1, 1 + gap, 0], [1, 1 + gap, 0]).near_ties == 0


def test_figures_against_loops() -> None:
    generator = np.random.default_rng(0)
    a = generator.standard_normal((7, 11)).astype(np.float32)
    b = (a + 0.3 * generator.standard_normal((7, 11))).astype(np.float32)
    absolute, relative, cosines, kls, same = [], [], [], [], []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        size = math.sqrt(sum(v * v for v in x) / 11)
        absolute += [abs(v - w) for v, w in zip(x, y, strict=True)]
        relative += [abs(v - w) / max(abs(v), size) for v, w in zip(x, y, strict=True)]
        cosines.append(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)))
        p, q = (np.exp(v) / np.exp(v).sum() for v in (x, y))
        kls.append(float(np.sum(p * np.log(p / q))))
        same.append(int(np.argmax(x) == np.argmax(y)))
    found = compare_vectors(a, b, near_tie=0.0)
    assert found.tokens == 7 and found.near_ties == 0 and 0 < found.top1 == sum(same) / 7 < 1
    assert (found.max_abs, found.mean_abs) == pytest.approx((max(absolute), sum(absolute) / 77), rel=1e-12)
    assert (found.max_rel, found.mean_rel) == pytest.approx((max(relative), sum(relative) / 77), rel=1e-12)
    # Of 77 numbers in order, the 99th percentile lies between the last two: at 0.99 · 76 = 75.24.
    for figure, values in ((found.p99_abs, sorted(absolute)), (found.p99_rel, sorted(relative))):
        assert figure == pytest.approx(values[75] + 0.24 * (values[76] - values[75]), rel=1e-12)
    assert found.min_cosine == pytest.approx(min(cosines), rel=1e-12)
    assert found.max_kl == pytest.approx(max(kls), rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_one_number_that_is_none_is_in_every_figure_of_distance(side: int, bad: float) -> None:
    pair = [np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)]
    pair[side][1, 2] = bad
    with np.errstate(invalid="ignore"):
        found = compare_vectors(pair[0], pair[1], near_tie=0.0)
    assert not np.isfinite([found.max_abs, found.mean_abs]).any()
    # None of them keeps a gate, whichever it is.
    assert not found.min_cosine >= 0.9 and not found.max_kl <= 1.0


def test_logits_far_from_zero_do_not_overflow() -> None:
    found = log_softmax(np.array([[1e4, 1e4 + math.log(3)], [-1e4, -1e4]]))
    np.testing.assert_allclose(np.exp(found), [[0.25, 0.75], [0.5, 0.5]], rtol=1e-9)


def test_zeros_are_equal_to_zeros_and_to_nothing_else() -> None:
    zeros, ones = np.zeros((2, 20), np.float32), np.ones((2, 20), np.float32)
    with np.errstate(all="raise"):
        same = compare_vectors(zeros, zeros, near_tie=0.0)
    with np.errstate(invalid="ignore"):  # between infinity and infinity there is no 99th percentile
        found = compare_vectors(zeros, ones, near_tie=0.0)
        lost = compare_vectors(ones, zeros, near_tie=0.0)
    assert (same.max_abs, same.max_rel, same.min_cosine, same.max_kl, same.top1) == (0, 0, 1, 0, 1)
    assert found.max_rel == float("inf") and found.min_cosine == 0
    assert lost.max_rel == 1 and lost.min_cosine == 0


GATES = gates_for("float32")


INPUTS = {
    "input_ids": np.ones((2, 4), dtype=np.int64),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=np.int64),
}


def outputs() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    shapes = {"last_hidden_state": (2, 4, 32), "pooler_output": (2, 32), "logits": (2, 5)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def failures(changed: dict[str, Any], gates: Gates = GATES) -> list[str]:
    return compare_batches([outputs()], [changed], [INPUTS], gates).failures()


def test_equal_outputs_pass_and_count_real_tokens() -> None:
    parity = compare_batches([outputs()], [outputs()], [INPUTS], GATES)
    assert not parity.failures() and parity.lengths == (4, 2)
    assert {o.output: o.tokens for o in parity.outputs} == {
        "last_hidden_state": 6,
        "pooler_output": 2,
        "logits": 2,
    }


def test_padding_is_not_compared_and_a_token_is() -> None:
    changed = outputs()
    changed["last_hidden_state"][1, 2:] = np.nan
    assert not failures(changed)
    changed["last_hidden_state"][1, 1, 3] += 0.01
    assert any("max relative difference of last_hidden_state" in f for f in failures(changed))


@pytest.mark.parametrize("name", ["last_hidden_state", "pooler_output", "logits"])
def test_nan_or_a_missing_output_fails(name: str) -> None:
    changed = outputs()
    changed[name] = changed[name] * np.nan
    assert failures(changed)
    del changed[name]
    assert failures(changed)


def test_logits_are_held_to_their_own_gates() -> None:
    changed = outputs()
    changed["logits"] = np.roll(changed["logits"], 1, axis=1)
    found = " ".join(failures(changed))
    assert "|Δlogit|" in found and "KL" in found and "top-1" in found and "relative" not in found
