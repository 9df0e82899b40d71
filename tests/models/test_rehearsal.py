"""A model is tried in another precision before it is run in it."""

from __future__ import annotations

from typing import Any

import torch

from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import block_stack
from nbl_export.models.rehearsal import why_not_run
from tests.tiny_types import tiny_model


def test_what_runs_says_nothing_and_stays_as_it_was() -> None:
    model: Any = tiny_model("llama")
    dummy_run(model)
    blocks = list(block_stack(model)[1].children())
    assert why_not_run(model.to(torch.bfloat16)) is None
    assert list(block_stack(model)[1].children()) == blocks


def test_what_does_not_run_says_why_in_a_line() -> None:
    model: Any = tiny_model("llama")
    dummy_run(model)
    model.model.norm.to(torch.bfloat16)
    model.model.layers[0].mlp.to(torch.bfloat16)
    why = why_not_run(model)
    assert why is not None and "dtype" in why and "\n" not in why
