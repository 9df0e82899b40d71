"""A file with another W or b is seen, in every format, without the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.blocks import Block, Mlp
from nbl_export.convert.gguf import FORMATS, write_gguf
from nbl_export.convert.gguf_tokenizer import TokenizerFields
from nbl_export.convert.stored import check_stored
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.progress import Silent
from tests.tiny_types import tiny_model

CHANGES: dict[str, Callable[[LinearLayer], LinearLayer]] = {
    "scaled W": lambda one: LinearLayer(one.w * np.float32(1.02), one.b),
    "transposed W": lambda one: LinearLayer(np.ascontiguousarray(one.w.T), one.b),
    "no bias": lambda one: LinearLayer(one.w, 0 * one.b),
    "NaN": lambda one: LinearLayer(np.where(np.eye(32), np.nan, one.w).astype(np.float32), one.b),
}


@pytest.mark.parametrize("form", FORMATS)
def test_what_the_file_has_of_the_plan(
    form: str,
    tmp_path: Path,
    random_plan: Callable[[Any, Sequence[Block]], Plan],
    no_tokenizer: TokenizerFields,
) -> None:
    model = tiny_model("llama")
    plan, path = random_plan(model, [1, Mlp(2)]), tmp_path / "model.gguf"
    write_gguf(path, model, plan, no_tokenizer, form, Silent())
    found = check_stored(path, plan)
    assert found.status == "passed" and ("exactly" in found.detail) == (form == "F32")
    for name, change in CHANGES.items():
        other = replace(plan, layers={**plan.layers, Mlp(2): change(plan.layers[Mlp(2)])})
        if name == "NaN":  # the plan is right, and the file is not
            if form != "Q8_0":
                write_gguf(path, model, other, no_tokenizer, "F32", Silent())
                assert check_stored(path, plan).status == "failed"
            continue
        failed = check_stored(path, other)
        assert failed.status == "failed" and failed.detail.startswith("layer 2.mlp has"), name
    assert check_stored(path, random_plan(model, [1, 0])).status == "failed"
