"""Graphs of torch's older exporter, with names of their own: rewritten right, whatever their inputs are called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import pytest

from tests.end_to_end.matrix import CHOSEN, parity, rewritten
from tests.exhaustive import exhaustive
from tests.exporters import FLAT, GRAPH, NUMBERED, Names, torchscript
from tests.families import Calibrated, build

USUAL = ("input_ids", "attention_mask", "position_ids")
OWN = ("tokens", "visible", "where")
ABSENT = Names(FLAT.past, lambda layer, side: f"out.{side}.{layer}")


@pytest.mark.parametrize(
    ("family", "tokens", "names"),
    [
        ("llama-gqa", OWN, NUMBERED),
        pytest.param("gpt2", OWN, ABSENT, marks=exhaustive),  # positions choose rows of a table
    ],
)
def test_every_layer(
    family: str,
    tokens: Sequence[str],
    names: Names,
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "graph"
    folder.mkdir()
    torchscript(names, tokens)(build(family, tmp_path / "model"), folder)
    case = calibrated_of(family)
    for k, chosen in CHOSEN.items():
        plan = case.plan(chosen)
        out, result = rewritten(folder, plan, tmp_path / k)
        assert result.before.kv_pairs - result.after.kv_pairs == len(plan.linear_attention)
        assert parity(case.model, plan, out / GRAPH).failures() == []
        graph = onnx.load(str(out / GRAPH), load_external_data=False).graph
        assert [i.name for i in graph.input][:3] == list(tokens)
