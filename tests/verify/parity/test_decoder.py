"""Parity: every figure against numbers worked out by hand, and every gate on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import InputError
from nbl_export.runtime.stream import DecoderOutput, PastStream
from nbl_export.verify.parity.decoder import compare_streams
from nbl_export.verify.parity.figures import Parity, gates_for

GATES = gates_for("float32")
VOCAB, HEADS, DIM = 5, 2, 3
ROWS = [np.array([7, 8, 9, 10], dtype=np.int32), np.array([20, 21, 22], dtype=np.int32)]


class Scripted:
    """A decoder that answers with what it is given, and remembers what it was asked."""

    def __init__(self, answers: Sequence[DecoderOutput], kv_layers: tuple[int, ...] = (0,)) -> None:
        self.answers, self.kv_layers = list(answers), kv_layers
        self.asked: list[tuple[Any, ...]] = []

    def empty_past(self, batch: int) -> Any:
        return f"nothing for {batch}"

    def __call__(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any, num_logits: int = 0
    ) -> DecoderOutput:
        self.asked.append((input_ids, attention_mask, position_ids, past))
        return self.answers[len(self.asked) - 1]


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


def test_both_are_asked_the_same_with_their_own_caches() -> None:
    a, b = Scripted(answers(seed=1)), Scripted(answers(seed=2))
    parity = compare_streams(PastStream(a), PastStream(b), ROWS, 1, GATES)
    assert parity.prompt_lengths == (3, 2)
    for decoder in (a, b):
        prefill, step = decoder.asked
        assert prefill[0].tolist() == [[7, 8, 9], [0, 20, 21]]
        assert prefill[1].tolist() == [[1, 1, 1], [0, 1, 1]]
        assert prefill[2][0].tolist() == [0, 1, 2] and prefill[2][1, 1:].tolist() == [0, 1]
        assert prefill[3] == "nothing for 2"
        assert step[0].tolist() == [[10], [22]]
        assert step[1].tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
        assert step[2].tolist() == [[3], [2]]
        assert step[3] is decoder.answers[0].present
        assert all(array.dtype == np.int64 for asked in decoder.asked for array in asked[:3])


def test_several_steps_teach_the_rows_own_tokens() -> None:
    outputs = answers()
    decoders = [Scripted([outputs[0], *[outputs[1]] * 3]) for _ in range(2)]
    for decoder in decoders:  # the caches need not grow for this
        decoder.answers = [DecoderOutput(o.logits[:, -1:], ()) for o in decoder.answers]
        decoder.kv_layers = ()
    rows = [np.arange(4, dtype=np.int32), np.arange(10, 14, dtype=np.int32)]
    parity = compare_streams(PastStream(decoders[0]), PastStream(decoders[1]), rows, 3, GATES)
    assert [s.step for s in parity.steps] == [0, 1, 2, 3]
    assert all(s.kv_worst_layer is None and s.kv_max_rel == 0 for s in parity.steps)
    assert [asked[0].tolist() for asked in decoders[0].asked] == [
        [[0], [10]],
        [[1], [11]],
        [[2], [12]],
        [[3], [13]],
    ]
    assert [asked[2].tolist() for asked in decoders[0].asked] == [[[n], [n]] for n in range(4)]


def test_equal_decoders_pass_with_nothing_to_report() -> None:
    outputs = answers(layers=2)
    parity = compare(outputs, copied(outputs), (0, 3))
    assert parity.failures() == []
    for step, tokens in zip(parity.steps, (5, 2), strict=True):
        assert step.tokens == tokens
        assert (step.max_abs, step.max_rel, step.max_kl, step.kv_max_abs, step.kv_max_rel) == (0,) * 5
        assert step.top1 == 1 and step.near_ties == 0
        assert step.min_cosine == pytest.approx(1, abs=1e-12)


def test_figures_are_the_worst_token_s() -> None:
    reference = answers()
    candidate = copied(reference)
    candidate[0].logits[1, 2, 4] += 0.25
    step, clean = compare(reference, candidate).steps
    assert step.max_abs == pytest.approx(0.25, rel=1e-6)
    assert step.mean_abs == pytest.approx(0.25 / (5 * VOCAB), rel=1e-6)
    x = reference[0].logits[1, 2].astype(np.float64)
    y = candidate[0].logits[1, 2].astype(np.float64)
    assert step.min_cosine == pytest.approx(float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)), rel=1e-9)
    p, q = (np.exp(v) / np.exp(v).sum() for v in (x, y))
    assert step.max_kl == pytest.approx(float(np.sum(p * np.log(p / q))), rel=1e-6)
    assert clean.max_abs == 0


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
        compare_streams(PastStream(Scripted([], (0, 1))), PastStream(Scripted([], (0, 2))), ROWS, 1, GATES)


# gates -------------------------------------------------------------------------------------------
