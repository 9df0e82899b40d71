"""Parity of an encoder: each gate fails alone, padding is not looked at, and half is judged by PyTorch's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nbl_export.verify.parity.encoder import compare_outputs
from nbl_export.verify.parity.figures import Gates, gates_for

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
    return compare_outputs(outputs(), changed, INPUTS, gates).failures()


def test_equal_outputs_pass_and_count_real_tokens() -> None:
    parity = compare_outputs(outputs(), outputs(), INPUTS, GATES)
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


def test_half_is_judged_by_pytorch_s_own_loss() -> None:
    gates = replace(gates_for("float16"))
    generator = np.random.default_rng(1)
    noise = {n: generator.standard_normal(a.shape).astype(np.float32) for n, a in outputs().items()}

    def parity(scale: float) -> Any:
        changed = {n: a + scale * noise[n] for n, a in outputs().items()}
        return compare_outputs(outputs(), changed, INPUTS, gates)

    own = parity(1e-3)
    assert not parity(1.4e-3).failures_against(own, "PyTorch's own")
    found = parity(1.6e-3).failures_against(own, "PyTorch's own")
    assert len(found) == 3 and "PyTorch's own" in found[0]
