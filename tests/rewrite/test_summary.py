"""What is kept of a rewrite, against the graphs that it left on disk."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import onnx
import pytest

from nbl_export.errors import InputError
from nbl_export.graph.summary import GraphSummary
from nbl_export.linearize.plan import load_plan
from nbl_export.records import from_json, to_json
from nbl_export.rewrite.summary import ProofErrors, RewriteSummary
from nbl_export.workspace import Workspace


@pytest.fixture
def kept(stories_out: Path) -> RewriteSummary:
    raw = json.loads(Workspace.open(stories_out).rewrite_summary.read_text())
    return from_json(RewriteSummary, raw, "it", "do it again")


def test_before_and_after_are_the_files_of_the_run(stories_out: Path, kept: RewriteSummary) -> None:
    for found, path in ((kept.before, "baseline/model.onnx"), (kept.after, "model.onnx")):
        graph = onnx.load(str(stories_out / path), load_external_data=False).graph
        assert dict(found.ops) == Counter(node.op_type for node in graph.node)
        assert (found.inputs, found.outputs) == (len(graph.input), len(graph.output))
        assert found.initializers == len(graph.initializer)
        pasts = [i.name for i in graph.input if i.name.startswith("past_key_values")]
        assert found.kv_pairs == len(pasts) / 2
        # Keys and values of four heads of eight float32.
        assert found.kv_bytes_per_token == len(pasts) * 4 * 8 * 4


def test_two_layers_are_gone_and_every_layer_is_proven(stories_out: Path, kept: RewriteSummary) -> None:
    chosen = load_plan(Workspace.open(stories_out).plan).chosen
    assert kept.before.ops["Attention"] - kept.after.ops["Attention"] == len(chosen) == 2
    # q, k, v and o of width 64 went, W and b came.
    assert kept.before.parameters - kept.after.parameters >= 2 * (64 * 64 * 2 + 2 * 64 * 32 - 64 * 64 - 64)
    assert kept.kv_layers == tuple(i for i in range(5) if i not in chosen)
    assert [p.layer for p in kept.proofs] == [0, 1, 2, 3, 4]
    assert all(0 <= error < 1e-4 for p in kept.proofs for error in (p.input_error, p.output_error))


def test_a_tensor_that_a_graph_does_not_have_is_kept_as_infinitely_far() -> None:
    nothing = GraphSummary(0, {}, 0, 0, 0, 0, 0, 0, 0)
    summary = RewriteSummary(nothing, nothing, (0,), (ProofErrors(0, float("inf"), 0.5),))
    text = json.dumps(to_json(summary), allow_nan=False)
    assert json.loads(text)["proofs"] == [{"layer": 0, "input_error": "inf", "output_error": 0.5}]
    assert from_json(RewriteSummary, json.loads(text), "it", "do it again") == summary


@pytest.mark.parametrize("missing", ["before", "after", "kv_layers", "proofs"])
def test_half_a_record_is_none(kept: RewriteSummary, missing: str) -> None:
    raw = to_json(kept)
    del raw[missing]
    with pytest.raises(InputError, match="it is damaged"):
        from_json(RewriteSummary, raw, "it", "do it again")
