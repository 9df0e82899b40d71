"""Foreign graphs that cannot be rewritten, or only look as if: what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nbl_export.errors import BuildError, InputError
from tests.end_to_end.matrix import parity, rewritten
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


@pytest.mark.slow
def test_the_epsilon_of_a_layer_norm_reaches_the_builder(tmp_path: Path) -> None:
    source = build("parallel-residual", tmp_path / "model", layer_norm_eps=1e-3)
    (tmp_path / "graph").mkdir()
    genai("fp32")(source, tmp_path / "graph")
    case = calibrated(source)
    assert parity(case.model, case.plan(()), tmp_path / "graph" / GRAPH).failures() == []
