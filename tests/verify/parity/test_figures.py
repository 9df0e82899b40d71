"""Gates: each fails alone, at its worst place, and by NaN; what a precision loses anyway is told from the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from nbl_export.verify.parity.figures import (
    Gates,
    OutputParity,
    OutputsParity,
    Parity,
    StepParity,
    gates_for,
)

GATES = gates_for("float32")


def test_the_gates_are_these_and_nobody_loosens_them() -> None:
    assert gates_for("float32") == Gates(
        max_abs_logit=1e-3,
        min_cosine=0.999999,
        max_kl=1e-6,
        top1=1.0,
        near_tie=2e-3,
        max_rel_kv=1e-3,
        max_rel_state=1e-3,
    )


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


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("min_cosine", 0.99960123, "cosine is 0.999601 at"),
        ("min_cosine", 0.99999894, "cosine is 0.99999894 at"),
        ("min_cosine", -0.25, "cosine is -0.25 at"),
        ("top1", 2 / 3, "top-1 agreement is 0.667 at"),
        ("max_abs", 0.86712, "max |Δlogit| is 0.867 at"),
        ("max_kl", 1.2345e-5, "KL is 1.23e-05 at"),
        ("max_abs", float("inf"), "max |Δlogit| is inf at"),
    ],
)
def test_what_fails_is_not_rounded_to_what_passes(field: str, value: float, said: str) -> None:
    (failure,) = Parity((9,), (replace(PERFECT, **{field: value}),), GATES).failures()
    assert failure.startswith(said)


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


def test_half_has_wide_gates_and_one_that_is_relative_to_pytorch() -> None:
    assert gates_for("float16") == Gates(0.5, 0.999, 1e-2, 1.0, 0.5, 0.25, 0.25, 1.5)
    assert gates_for("bfloat16") == Gates(4.0, 0.97, 0.25, 1.0, 4.0, 2.0, 2.0, 1.5)


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


def test_the_cosine_of_few_numbers_tells_nothing() -> None:
    assert outputs(output("logits", width=15, min_cosine=0.5)).failures() == []
    assert len(outputs(output("logits", width=16, min_cosine=0.5)).failures()) == 1


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
