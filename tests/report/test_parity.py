"""Parity as a table: every figure in its column, gates that limit something, and what the precision loses anyway."""

from __future__ import annotations

from dataclasses import replace
from math import nan
from typing import Any

from nbl_export.report.parity import parity_table
from nbl_export.verify.parity.figures import (
    Crossing,
    DecoderParity,
    EncoderParity,
    Gates,
    OutputParity,
    StepParity,
)

# Each figure another, so that no column can stand for another.
FIGURES: dict[str, Any] = {
    "tokens": 7,
    "max_abs": 1.1e-3,
    "mean_abs": 1.2e-4,
    "p99_abs": 1.3e-3,
    "max_rel": 1.4e-2,
    "mean_rel": 1.5e-3,
    "p99_rel": 1.6e-2,
    "min_cosine": 1 - 2**-10,  # so that what is left of one is exact: 9.8e-4
    "max_kl": 1.7e-5,
    "top1": 0.998,
    "near_ties": 1,
}
GATES = Gates(max_abs_logit=0.05, min_cosine=0.999, max_kl=1e-3, top1=1.0, near_tie=0.01, max_rel_kv=0.02)


def steps(count: int, **changes: Any) -> tuple[StepParity, ...]:
    return tuple(StepParity(**{**FIGURES, **changes}, step=n, kv_max_rel=1.8e-4) for n in range(count))


def decoder(**changes: Any) -> DecoderParity:
    fields: dict[str, Any] = {"prompt_lengths": (3, 17), "steps": steps(3), "gates": GATES}
    return DecoderParity(**{**fields, "precision": "fp32", "rounding_noise": 2.5e-6, **changes})


def encoder(*outputs: str, **changes: Any) -> EncoderParity:
    found = tuple(OutputParity(**FIGURES, output=name, width=64) for name in outputs)
    fields: dict[str, Any] = {
        "rows": 2,
        "lengths": (5, 9),
        "outputs": found,
        "gates": GATES,
        "precision": "fp32",
    }
    return EncoderParity(**{**fields, **changes})


def test_a_step_is_a_row() -> None:
    table = parity_table(decoder())
    assert [dict(zip(table.columns, row, strict=True)) for row in table.rows[:1]] == [
        {
            "": "prefill",
            "n": "7",
            "max |Δ|": "1.1e-3",
            "mean |Δ|": "1.2e-4",
            "p99 |Δ|": "1.3e-3",
            "max rel": "1.4e-2",
            "mean rel": "1.5e-3",
            "p99 rel": "1.6e-2",
            "1-cos": "9.8e-4",
            "KL": "1.7e-5",
            "top-1": "99.8%",
            "KV rel": "1.8e-4",
        }
    ]
    assert [row[0] for row in table.rows] == ["prefill", "step 1", "step 2"]
    assert "Prompts of 3, 17 tokens" in table.note and "own logits by 2.5e-6." in table.note


def test_a_narrow_table_is_the_wide_one_without_some_columns() -> None:
    for parity in (decoder(), encoder("logits", "last_hidden_state")):
        wide, narrow = parity_table(parity), parity_table(parity, brief=True)
        assert set(narrow.columns) < set(wide.columns)
        kept = [wide.columns.index(name) for name in narrow.columns]
        assert narrow.rows == tuple(tuple(row[i] for i in kept) for row in wide.rows)


def test_gates_that_limit_nothing_are_not_said() -> None:
    assert parity_table(decoder()).note.startswith(
        "Gates: max |Δlogit| ≤ 0.05, cosine ≥ 0.999, KL ≤ 0.001, top-1 100% up to near-ties of 0.01, KV ≤ 0.02. "
    )
    only = parity_table(decoder(gates=Gates(max_kl=0.5)))
    assert only.note.startswith("Gates: KL ≤ 0.5. Prompts")
    assert "Gates" not in parity_table(decoder(gates=Gates())).note


def test_what_the_precision_loses_anyway() -> None:
    gates = replace(GATES, max_vs_own=2.0)
    own = (*steps(1, max_abs=0.5, mean_abs=0.25), *steps(1, max_abs=0.75, mean_abs=0.5))
    half = parity_table(decoder(precision="fp16", gates=gates, pytorch_in_precision=own)).note
    assert half.endswith(
        " PyTorch itself in fp16, on the same tokens: max |Δlogit| 7.5e-1, mean 3.8e-1; this graph's mean, 1.2e-4, "
        "may be 2 times that."
    )
    quantized = parity_table(decoder(precision="int4", gates=gates, base_graph=own)).note
    assert "The unmodified int4 graph against unmodified PyTorch" in quantized and "7.5e-1" in quantized
    assert "times that" not in parity_table(decoder()).note


def test_an_output_is_a_row_and_classes_are_of_logits_alone() -> None:
    table = parity_table(encoder("last_hidden_state", "logits"))
    assert table.columns[-2:] == ("KL", "top-1") and "p99 rel" not in table.columns
    states, logits = table.rows
    assert states[:3] == ("last_hidden_state", "7", "1.1e-3") and states[-2:] == ("", "")
    assert logits[-2:] == ("1.7e-5", "99.8%")
    assert "top-1 100%" in table.note and "Texts of 5, 9 tokens, padded to one batch" in table.note
    without = parity_table(encoder("sentence_embedding"))
    assert "top-1" not in without.columns and "top-1" not in without.note and "cosine ≥ 0.999" in without.note
    assert "One batch of 2 images" in parity_table(encoder("pooler_output", lengths=())).note


def test_how_an_encoder_s_lengths_were_crossed_is_said() -> None:
    crossings = (
        Crossing("local_attention", 128, (1,), "rows", (136,)),
        Crossing("sliding_window", 9000, (1,), "copy", small=16),
    )
    assert parity_table(encoder("a", crossings=crossings)).note.endswith(
        "Texts of 5, 9 tokens, padded to one batch, and of 136 tokens each beside a short one; only real tokens are "
        "compared. Lengths from which on the model computes something else: local_attention 128: crossed by the rows; "
        "sliding_window 9,000: crossed on a copy with 16."
    )


def test_what_an_encoder_loses_anyway() -> None:
    own = (OutputParity(**{**FIGURES, "mean_abs": 0.125}, output="a", width=64),)
    parity = encoder("a", precision="bf16", gates=Gates(max_vs_own=1.5), pytorch_in_precision=own)
    assert parity_table(parity).note.endswith(
        " PyTorch itself in bf16, on the same batch, has a mean |Δ| of: a 1.2e-1; this graph's may be 1.5 times that."
    )


def test_what_is_no_number_is_shown() -> None:
    table = parity_table(decoder(steps=steps(1, max_abs=nan, min_cosine=nan, top1=nan)))
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["max |Δ|"] == row["1-cos"] == row["top-1"] == "nan"
