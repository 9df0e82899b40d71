"""Graphs of the language models inside multimodal checkpoints, unmodified and rewritten, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export.blocks import attentions
from nbl_export.export.checks import check_form
from nbl_export.export.forms import FORMS
from nbl_export.export.ranges import save_in_precision
from nbl_export.export.torch import export_torch
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import precision_of
from nbl_export.rewrite.replace import rewrite_file
from tests.end_to_end.matrix import ROWS, parity
from tests.exhaustive import exhaustive
from tests.exporters import GRAPH
from tests.families import LAYERS, Calibrated
from tests.multimodal import LENDING, WRAPPERS

# Found by the same structure as the others.
_MORE = ("qwen2-vl", "glm4v", "llava-next", "idefics3", "internvl", "gemma4-both-ways", "qwen2-audio")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(pytest.param(name, "concat", marks=exhaustive if name in _MORE else ()) for name in WRAPPERS),
        ("qwen2.5-vl", "static"),
        ("llama4", "static"),
        pytest.param("llava", "none", marks=exhaustive),
    ],
)
def test_graph(name: str, form: str, wrapper: Callable[[str], Calibrated], tmp_path: Path) -> None:
    """Ragged prefill and decode, one linear layer and half of them; in half precision half of them."""
    case = wrapper(name)
    check_form(case.model, FORMS[form])
    source = tmp_path / GRAPH
    export_torch(case.model, source, form=FORMS[form])
    candidates = attentions(case.moments.layers)
    for k, layers in (("one", candidates[:1]), ("half", candidates[1::2])):
        plan = case.plan(layers)
        result = rewrite_file(source, plan, tmp_path / k / GRAPH)
        if form != "none" and name not in LENDING:
            assert (result.before.kv_pairs, result.after.kv_pairs) == (LAYERS, LAYERS - len(plan.chosen))
        assert parity(case.model, plan, tmp_path / k / GRAPH).failures() == []
    for precision in ("fp16", "bf16") if (name, form) == ("gemma3", "concat") else ():
        half = tmp_path / precision / GRAPH
        half.parent.mkdir()
        save_in_precision(load_graph(source), half, precision_of(precision), ROWS)
        rewrite_file(half, plan, half.parent / "half.onnx")
        assert (
            parity(case.model, plan, half.parent / "half.onnx", precision_of(precision).gates).failures()
            == []
        )
