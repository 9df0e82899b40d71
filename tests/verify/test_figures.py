"""Gates: each fails alone, at its worst place, and by NaN; what a precision loses anyway is told from the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import InputError
from nbl_export.runtime.stream import DecoderOutput, PastStream
from nbl_export.verify.parity.compare import Recorded, compare_batches, compare_vectors, log_softmax
from nbl_export.verify.parity.compare import compare as compare_figures
from nbl_export.verify.parity.figures import (
    Figures,
    Gates,
    OutputParity,
    OutputsParity,
    Parity,
    StepParity,
    gates_for,
)
from tests.fixtures_graph import compare_streams

GATES = gates_for("float32")


@pytest.mark.parametrize(
    ("dtype", "gates"),
    [
        ("float32", (1e-3, 0.999999, 1e-6, 1.0, 2e-3, 1e-3, 1e-3)),
        ("unmodified", (1e-3, 0.999999, 1e-6, 1.0, 2e-3, 1e-3, 1e-3)),
        ("float16", (0.5, 0.999, 1e-2, 1.0, 0.5, 0.25, 0.25, 1.5)),
        ("bfloat16", (4.0, 0.97, 0.25, 1.0, 4.0, 2.0, 2.0, 1.5)),
    ],
)
def test_the_gates_are_these_and_nobody_loosens_them(dtype: str, gates: tuple[float, ...]) -> None:
    assert gates_for(dtype) == Gates(*gates)


PERFECT = StepParity(
    step=0,
    tokens=9,
    max_abs=0,
    mean_abs=0,
    p99_abs=0,
    max_rel=0,
    mean_rel=0,
    p99_rel=0,
    min_cosine=1,
    max_kl=0,
    top1=1,
    near_ties=0,
    kv_max_abs=0,
    kv_max_rel=0,
    kv_mean_rel=0,
    kv_worst_layer=None,
)


@pytest.mark.parametrize(
    ("field", "allowed", "refused", "name"),
    [
        ("max_abs", 1e-3, 1.001e-3, "max |Δlogit|"),
        ("min_cosine", 0.999999, 0.9999989, "cosine"),
        ("max_kl", 1e-6, 1.001e-6, "KL"),
        ("top1", 1.0, 0.999, "top-1 agreement"),
        ("kv_max_rel", 1e-3, 1.001e-3, "KV relative error"),
    ],
)
def test_each_gate_fails_alone(field: str, allowed: float, refused: float, name: str) -> None:
    def failures(value: float) -> list[str]:
        steps = (PERFECT, replace(PERFECT, step=1, **{field: value}), replace(PERFECT, step=2))
        return Parity((9,), steps, GATES).failures()

    assert failures(allowed) == []
    (failure,) = failures(refused)
    assert failure.startswith(f"{name} is ") and "at step 1" in failure
    (failure,) = failures(float("nan"))
    assert failure.startswith(f"{name} is nan at step 1")


def parity_of(means: Sequence[float], limit: float = 1.5) -> Parity:
    steps = tuple(
        StepParity(1, 0, mean, *[0.0] * 4, 1, 0, 1, 0, step=n)  # type: ignore[arg-type]
        for n, mean in enumerate(means)
    )
    return Parity((1,), steps, Gates(1, 0, 1, 0, 0, 1, max_vs_own=limit))


def test_the_mean_of_all_steps_counts() -> None:
    own = parity_of([0.02, 0.04], limit=99)
    assert parity_of([0.045, 0.045]).failures_against(own, "PyTorch's own in this precision") == []
    assert parity_of([0.089, 0.0]).failures_against(own, "PyTorch's own in this precision") == []
    (told,) = parity_of([0.0, 0.092]).failures_against(own, "PyTorch's own in this precision")
    assert told == (
        "mean |Δlogit| is 0.046, PyTorch's own in this precision 0.03; the gate is 1.5 times that"
    )
    assert len(parity_of([float("nan"), 0.0]).failures_against(own, "PyTorch's own in this precision")) == 1
    assert (
        parity_of([0.0, 0.0]).failures_against(parity_of([0.0, 0.0]), "PyTorch's own in this precision") == []
    )
    assert parity_of([0.046, 0.046], limit=2).failures_against(own, "PyTorch's own in this precision") == []


NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([1.0, 3.0, 2.0], 1),
        ([1.0, 3.0, 3.0], 1),
        ([9.0, NAN, 2.0], 1),
        ([NAN, 9.0, NAN], 0),
        ([1.0, 2.0, float("inf")], 2),
    ],
    ids=str,
)
def test_the_worst_step_is_named_and_nan_is_worse_than_any_number(values: list[float], step: int) -> None:
    steps = tuple(replace(PERFECT, step=n, max_abs=value) for n, value in enumerate(values))
    (told,) = Parity((9,), steps, GATES).failures()
    assert told.startswith(f"max |Δlogit| is {values[step]:.3g} at step {step};")
    # Of what must be large, the least is the worst.
    low = tuple(replace(PERFECT, step=n, min_cosine=1 - value) for n, value in enumerate(values))
    (told,) = Parity((9,), low, GATES).failures()
    assert told.startswith("cosine is ") and f"at step {step};" in told


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_graphs_are_held_to_the_unmodified_one_alone(precision: str) -> None:
    gates = gates_for(precision)
    assert gates == Gates(max_vs_own=1.25)
    worst = replace(PERFECT, max_abs=1e9, mean_abs=0.126, min_cosine=-1, max_kl=1e9, top1=0, kv_max_rel=1e9)
    parity = Parity((9,), (worst,), gates)
    assert parity.failures() == []
    base = Parity((9,), (replace(PERFECT, mean_abs=0.1),), gates)
    (told,) = parity.failures_against(base, "the unmodified graph's own")
    assert told == "mean |Δlogit| is 0.126, the unmodified graph's own 0.1; the gate is 1.25 times that"
    # What has no gate still has to be a number.
    nan = replace(worst, max_abs=NAN, min_cosine=NAN, max_kl=NAN, top1=NAN, kv_max_rel=NAN)
    assert len(Parity((9,), (nan,), gates).failures()) == 5


def output(name: str = "last_hidden_state", width: int = 32, **changes: float) -> OutputParity:
    figures = {n: getattr(PERFECT, n) for n in vars(PERFECT) if not n.startswith(("kv_", "step"))}
    return OutputParity(**{**figures, **changes}, output=name, width=width)


def outputs(*found: OutputParity, gates: Gates = GATES) -> OutputsParity:
    return OutputsParity(2, (4, 2), found, gates)


@pytest.mark.parametrize(
    ("name", "field", "allowed", "refused", "said"),
    [
        ("pooler_output", "max_rel", 1e-3, 1.001e-3, "max relative difference"),
        ("pooler_output", "min_cosine", 0.999999, 0.9999989, "cosine"),
        ("logits", "max_abs", 1e-3, 1.001e-3, "max |Δlogit|"),
        ("logits", "max_kl", 1e-6, 1.001e-6, "KL"),
        ("logits", "top1", 1.0, 0.999, "top-1 agreement"),
        ("logits", "min_cosine", 0.999999, 0.9999989, "cosine"),
    ],
)
def test_each_gate_of_an_output_fails_alone(
    name: str, field: str, allowed: float, refused: float, said: str
) -> None:
    def failures(value: float) -> list[str]:
        return outputs(output(), output(name, **{field: value}), output("another")).failures()

    assert failures(allowed) == []
    for bad in (refused, NAN):
        (told,) = failures(bad)
        shown = f"{bad:.9g}" if said == "cosine" else f"{bad:.3g}"
        assert told.startswith(f"{said} of {name} is {shown}; the gate is ")


@pytest.mark.parametrize(
    ("name", "fields"),
    [("pooler_output", ("max_abs", "max_kl", "top1")), ("logits", ("max_rel",))],
)
def test_states_have_no_likeliest_token_and_logits_no_relative_gate(
    name: str, fields: tuple[str, ...]
) -> None:
    assert outputs(output(name, **dict.fromkeys(fields, NAN))).failures() == []


def test_every_output_is_held_to_its_own_loss() -> None:
    gates = gates_for("float16")
    own = outputs(output(mean_abs=0.01), output("logits", mean_abs=0.1), gates=gates)
    parity = outputs(output(mean_abs=0.015), output("logits", mean_abs=0.15), gates=gates)
    assert parity.failures_against(own, "PyTorch's own") == []
    # Less than the logits' own loss, and still too much for the states.
    for mean in (0.016, NAN):
        changed = outputs(output(mean_abs=mean), output("logits", mean_abs=0.0), gates=gates)
        (told,) = changed.failures_against(own, "PyTorch's own")
        assert (
            told
            == f"mean |Δ| of last_hidden_state is {mean:.3g}, PyTorch's own 0.01; the gate is 1.5 times that"
        )
    # Where PyTorch's own run is no number nothing is within it.
    broken = outputs(output(mean_abs=NAN), output("logits", mean_abs=0.1), gates=gates)
    assert len(parity.failures_against(broken, "PyTorch's own")) == 1


def one_token(a: list[float], b: list[float]) -> Figures:
    return compare_vectors(np.array([a], dtype=np.float32), np.array([b], dtype=np.float32), GATES.near_tie)


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


INPUTS = {
    "input_ids": np.ones((2, 4), dtype=np.int64),
    "attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=np.int64),
}


def made_outputs() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    shapes = {"last_hidden_state": (2, 4, 32), "pooler_output": (2, 32), "logits": (2, 5)}
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def batch_failures(changed: dict[str, Any], gates: Gates = GATES) -> list[str]:
    return compare_batches([made_outputs()], [changed], [INPUTS], gates).failures()


def test_padding_is_not_compared_and_a_token_is() -> None:
    changed = made_outputs()
    changed["last_hidden_state"][1, 2:] = np.nan
    assert not batch_failures(changed)
    changed["last_hidden_state"][1, 1, 3] += 0.01
    assert any("max relative difference of last_hidden_state" in f for f in batch_failures(changed))


@pytest.mark.parametrize("name", ["last_hidden_state", "pooler_output", "logits"])
def test_nan_or_a_missing_output_fails(name: str) -> None:
    changed = made_outputs()
    changed[name] = changed[name] * np.nan
    assert batch_failures(changed)
    del changed[name]
    assert batch_failures(changed)


VOCAB, HEADS, DIM = 5, 2, 3
ROWS = [np.array([7, 8, 9, 10], dtype=np.int32), np.array([20, 21, 22], dtype=np.int32)]


class Scripted:
    """A decoder that answers with what it is given."""

    def __init__(self, answers: Sequence[DecoderOutput], kv_layers: tuple[int, ...] = (0,)) -> None:
        self.answers, self.kv_layers = iter(answers), kv_layers

    def empty_past(self, batch: int) -> Any:
        return f"nothing for {batch}"

    def __call__(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any, num_logits: int = 0
    ) -> DecoderOutput:
        return next(self.answers)


def answers(layers: int = 1, seed: int = 0) -> list[DecoderOutput]:
    """A prefill of three tokens and one decode step for two rows; the second has one padding token."""
    generator = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return generator.standard_normal(shape).astype(np.float32)

    kv = [(normal(2, HEADS, 3, DIM), normal(2, HEADS, 3, DIM)) for _ in range(layers)]
    longer = [tuple(np.concatenate([t, normal(2, HEADS, 1, DIM)], axis=2) for t in pair) for pair in kv]
    return [
        DecoderOutput(normal(2, 3, VOCAB), tuple(kv)),
        DecoderOutput(normal(2, 1, VOCAB), tuple(longer)),  # type: ignore[arg-type]
    ]


def copied(outputs: Sequence[DecoderOutput]) -> list[DecoderOutput]:
    return [
        DecoderOutput(o.logits.copy(), tuple((k.copy(), v.copy()) for k, v in o.present)) for o in outputs
    ]


def compare(
    reference: Sequence[DecoderOutput], candidate: Sequence[DecoderOutput], layers: tuple[int, ...] = (0,)
) -> Parity:
    return compare_streams(
        PastStream(Scripted(reference, layers)), PastStream(Scripted(candidate, layers)), ROWS, 1, GATES
    )


def test_kv_figures_by_hand() -> None:
    """Relative to max(|a|, rms of the head's vector), over all real tokens of the cache."""
    reference = answers(layers=2)
    reference[1].present[1][0][1, 0, 2] = [3, 4, 0]  # rms √(25/3) = 2.887
    candidate = copied(reference)
    candidate[1].present[1][0][1, 0, 2] += np.array([0.0, 0.5, 0.25], dtype=np.float32)
    first, second = compare(reference, candidate, (1, 4)).steps
    assert first.kv_max_rel == 0
    assert second.kv_max_abs == pytest.approx(0.5)
    assert second.kv_max_rel == pytest.approx(0.5 / 4)
    assert second.kv_worst_layer == 4
    # Rows have 4 + 3 real tokens, 2 heads of 3: 42 numbers in each of 4 tensors.
    expected = (0.5 / 4 + 0.25 / math.sqrt(25 / 3)) / 42 / 4
    assert second.kv_mean_rel == pytest.approx(expected, rel=1e-6)


def test_padding_is_ignored() -> None:
    reference = answers()
    candidate = copied(reference)
    for side in (reference, candidate):
        side[0].logits[1, 0] = np.nan if side is candidate else 100
        for output in side:
            for tensor in output.present[0]:
                tensor[1, :, 0] = np.nan if side is candidate else 100
    parity = compare(reference, candidate)
    assert parity.failures() == []
    assert parity.steps[0].max_abs == parity.steps[1].kv_max_abs == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_logits_that_are_no_numbers_fail(side: str, bad: float) -> None:
    outputs = {"reference": answers(), "candidate": answers()}
    outputs[side][1].logits[0, 0, 2] = bad
    failures = compare(**outputs).failures()
    assert any("Δlogit" in f and "step 1" in f for f in failures)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("which", ["key", "value"])
@pytest.mark.parametrize("step", [0, 1])
def test_a_cache_that_is_no_number_fails_wherever_it_is(layer: int, which: str, step: int) -> None:
    reference = answers(layers=3)
    candidate = copied(reference)
    candidate[step].present[layer][which == "value"][0, 1, 2, 0] = np.nan
    parity = compare(reference, candidate, (0, 1, 2))
    assert any("KV relative error" in f and f"step {step}" in f for f in parity.failures())
    assert parity.steps[step].kv_worst_layer == layer


def test_a_cache_of_another_shape_fails_and_is_named() -> None:
    reference = answers(layers=2)
    candidate = copied(reference)
    key, value = candidate[1].present[1]
    candidate[1] = DecoderOutput(candidate[1].logits, (candidate[1].present[0], (key[:, :, 1:], value)))
    parity = compare(reference, candidate, (2, 7))
    assert parity.steps[1].kv_max_rel == float("inf") and parity.steps[1].kv_worst_layer == 7
    assert [f.split(" is ")[0] for f in parity.failures()] == ["KV relative error"]


def test_caches_of_other_layers_are_refused() -> None:
    with pytest.raises(InputError, match=r"caches layers \(0, 2\), the plan leaves \(0, 1\)"):
        compare_figures(Recorded((0, 1), (1,), ()), Recorded((0, 2), (1,), ()), GATES)


# gates -------------------------------------------------------------------------------------------
