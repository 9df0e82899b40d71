"""Foreign graphs that cannot be rewritten, or only look as if: what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from nbl_export.errors import BuildError, InputError
from nbl_export.runtime.ort import ort_stream
from tests.end_to_end.matrix import CAPACITY, CHOSEN, ROWS, parity, rewritten
from tests.exporters import GRAPH, Graphs, genai
from tests.families import Calibrated, build, calibrated


def test_a_graph_that_onnxruntime_does_not_run_is_refused(
    graphs: Graphs, calibrated_of: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    """Heads of 8: the builder makes the graph, onnxruntime's operator takes multiples of 16 only."""
    source = graphs("genai-fp32", "stories260K")
    with pytest.raises(
        InputError, match=r"does not run the graph: .* head_size shall be a multiple of 16"
    ) as caught:
        rewritten(source, calibrated_of("stories260K").plan((1,)), tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / GRAPH).exists()


def test_verifying_it_is_refused_the_same(graphs: Graphs) -> None:
    stream = ort_stream(graphs("genai-fp32", "stories260K") / GRAPH, CAPACITY)
    with pytest.raises(InputError, match="head_size shall be a multiple of 16"):
        stream.prefill(ROWS)


@pytest.mark.slow
def test_what_the_builder_has_no_architecture_for_is_refused(graphs: Graphs) -> None:
    with pytest.raises(BuildError, match=r"cannot export GPTNeoXForCausalLM .* choose another exporter"):
        graphs("genai-fp32", "parallel-fused")


FOREIGN = ["dynamo-18-sdpa", "genai-fp32", "genai-int4", "optimum"]


@pytest.mark.parametrize("exporter", FOREIGN)
def test_weights_of_another_training_are_not_proven(graphs: Graphs, tmp_path: Path, exporter: str) -> None:
    other = calibrated(build("llama-gqa", tmp_path / "other", seed=1))
    with pytest.raises(BuildError, match=r"Layer 1 is not proven: .* not of the model the plan was made for"):
        rewritten(graphs(exporter, "llama-gqa"), other.plan((1,)), tmp_path)
    assert not (tmp_path / "out" / GRAPH).exists()


@pytest.mark.parametrize("exporter", FOREIGN)
def test_another_layer_is_not_proven(
    graphs: Graphs, calibrated_of: Callable[[str], Calibrated], tmp_path: Path, exporter: str
) -> None:
    plan = calibrated_of("llama-gqa").plan((1,))
    swapped = replace(
        plan,
        probe_u={**plan.probe_u, 1: plan.probe_u[3], 3: plan.probe_u[1]},
        probe_y={**plan.probe_y, 1: plan.probe_y[3], 3: plan.probe_y[1]},
    )
    with pytest.raises(BuildError, match="Layer 1 is not proven"):
        rewritten(graphs(exporter, "llama-gqa"), swapped, tmp_path)


def test_a_rewritten_folder_is_refused(
    graphs: Graphs, calibrated_of: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    plan = calibrated_of("llama-gqa").plan((1,))
    out, _ = rewritten(graphs("genai-fp32", "llama-gqa"), plan, tmp_path)
    with pytest.raises(InputError, match="already rewritten"):
        rewritten(out, plan, tmp_path / "again")


def changed(source: Path, target: Path, change: Callable[[onnx.GraphProto], None]) -> Path:
    """A copy of the graph in ``source``, changed."""
    proto = onnx.load(str(source / GRAPH))
    change(proto.graph)
    target.mkdir()
    onnx.save(proto, str(target / GRAPH))
    return target


def rename_input(graph: onnx.GraphProto, old: str, new: str) -> None:
    for value in graph.input:
        value.name = new if value.name == old else value.name
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = new if name == old else name


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "position_ids"])
def test_an_input_of_another_name_is_seen_by_what_reads_it(
    graphs: Graphs, calibrated_of: Callable[[str], Calibrated], tmp_path: Path, name: str
) -> None:
    source = graphs("dynamo-18-sdpa", "llama-gqa")
    source = changed(source, tmp_path / "in", lambda graph: rename_input(graph, name, "something"))
    case = calibrated_of("llama-gqa")
    plan = case.plan((1,))
    out, _ = rewritten(source, plan, tmp_path)
    assert parity(case.model, plan, out / GRAPH).failures() == []


def test_logits_may_come_after_the_cache(
    graphs: Graphs, calibrated_of: Callable[[str], Calibrated], tmp_path: Path
) -> None:
    def logits_last(graph: onnx.GraphProto) -> None:
        outputs = list(graph.output)
        del graph.output[:]
        graph.output.extend([*outputs[1:], outputs[0]])

    case = calibrated_of("llama-gqa")
    plan = case.plan(CHOSEN["half"])
    source = changed(graphs("dynamo-18-sdpa", "llama-gqa"), tmp_path / "in", logits_last)
    out, _ = rewritten(source, plan, tmp_path)
    assert parity(case.model, plan, out / GRAPH).failures() == []


@pytest.mark.slow
def test_the_epsilon_of_a_layer_norm_reaches_the_builder(tmp_path: Path) -> None:
    source = build("parallel-residual", tmp_path / "model", layer_norm_eps=1e-3)
    (tmp_path / "graph").mkdir()
    genai("fp32")(source, tmp_path / "graph")
    case = calibrated(source)
    assert parity(case.model, case.plan(()), tmp_path / "graph" / GRAPH).failures() == []
