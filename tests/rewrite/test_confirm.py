"""Written linear layers: whatever is wrong with W or b is refused in every precision, and what is right is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from nbl_export.errors import BuildError
from nbl_export.graph.io import load_graph
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite import replace as module
from nbl_export.rewrite.confirm import check_layers, confirm, linear_part
from nbl_export.rewrite.prove import Proof
from nbl_export.rewrite.replace import proven_regions, rewrite_file
from tests.fixtures_graph import low_rank, plan_by_hand
from tests.mutations import OF_WEIGHTS, changed, of_another_input
from tests.precisions import PRECISIONS

LAYERS = (1, 3)


@pytest.fixture(scope="module")
def plan(stories_out: Path) -> Plan:
    return plan_by_hand(stories_out, LAYERS)


@pytest.fixture(scope="module")
def right(
    baseline_in: Callable[[str], Path], plan: Plan, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The rewritten graph by the name of its precision."""
    root = tmp_path_factory.mktemp("right")

    def graph(name: str) -> Path:
        path = root / name / "model.onnx"
        if not path.exists():
            rewrite_file(baseline_in(name), plan, path)
        return path

    return graph


def proofs_of(path: Path, plan: Plan) -> dict[int, Proof]:
    return proven_regions(path, plan).proofs


@pytest.mark.parametrize("name", PRECISIONS)
def test_whatever_is_wrong_with_w_or_b_is_refused(
    baseline_in: Callable[[str], Path],
    plan: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """A bug of the step that puts the layers in: every mutation, in one layer or the other.

    Each in each layer: scripts/mutation_table.py.
    """
    real = module.rewritten_model
    proven = proven_regions(baseline_in(name), plan)
    monkeypatch.setattr(
        module, "proven_regions", lambda *_: module.ProvenGraph(**fresh(baseline_in(name), proven))
    )
    for number, (what, wrong) in enumerate(OF_WEIGHTS.items()):
        layer = LAYERS[number % 2]
        monkeypatch.setattr(module, "rewritten_model", lambda g, q, w=wrong, i=layer: real(g, w(q, i)))
        with pytest.raises(BuildError, match=f"the linear layer {layer} differs by") as caught:
            rewrite_file(baseline_in(name), plan, tmp_path / "model.onnx")
        assert "\n" not in str(caught.value), what
        assert not (tmp_path / "model.onnx").exists()


def fresh(path: Path, proven: module.ProvenGraph) -> dict[str, Any]:
    """The proofs of before for the graph read again: a rewrite changes it."""
    model = load_graph(path)
    values = {v.name: v for node in model.graph for v in node.outputs}
    regions = [r for r in module.find_regions(model) if isinstance(r, module.AttentionRegion)]
    outputs = {r.layer: {o.value.name: o for o in r.outputs} for r in regions}
    proofs = {
        i: replace(p, u=values[p.u.name], y=outputs[i][p.y.value.name])  # type: ignore[union-attr]
        for i, p in proven.proofs.items()
    }
    return {**vars(proven), "model": model, "regions": regions, "proofs": proofs}


@pytest.mark.parametrize("name", PRECISIONS)
def test_right_layers_are_far_within_what_is_allowed(
    baseline_in: Callable[[str], Path], right: Callable[[str], Path], plan: Plan, name: str
) -> None:
    checks = confirm(right(name), proofs_of(baseline_in(name), plan), plan)
    assert [c.layer for c in checks] == list(LAYERS)
    for check in checks:
        assert check.failure == ""
        assert check.product < check.product_allowed / 2 and check.product_allowed < 0.02
        assert check.bias < check.bias_allowed / 2 and check.bias_allowed < 0.02
    # What the format costs, which is not held against the layer.
    low, high = {"fp32": (0, 1e-6), "fp16": (1e-5, 1e-3), "bf16": (1e-4, 1e-2), "int8": (1e-3, 0.02)}.get(
        name, (0.001, 0.2)
    )
    assert all(low <= check.stored <= high for check in checks)


@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_low_rank_is_checked_through_both_factors(
    baseline_in: Callable[[str], Path], plan: Plan, tmp_path: Path, name: str
) -> None:
    of_rank = low_rank(plan, 12)
    rewrite_file(baseline_in(name), of_rank, tmp_path / "model.onnx")
    proofs = proofs_of(baseline_in(name), plan)
    assert all(c.failure == "" for c in check_layers(tmp_path / "model.onnx", proofs, of_rank))
    other = low_rank(plan, 11)
    assert all("differs by" in c.failure for c in check_layers(tmp_path / "model.onnx", proofs, other))
    assert all(
        "2 products instead of 1" in c.failure for c in check_layers(tmp_path / "model.onnx", proofs, plan)
    )


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("weight", "layers.3.nbl_linear.weight is NaN or infinite"),
        ("bias", "layers.3.nbl_linear.bias is NaN or"),
    ],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_are_named(
    baseline_in: Callable[[str], Path],
    right: Callable[[str], Path],
    plan: Plan,
    tmp_path: Path,
    what: str,
    said: str,
    bad: float,
) -> None:
    proto = onnx.load(str(right("fp32")))
    (tensor,) = [t for t in proto.graph.initializer if t.name == f"layers.3.nbl_linear.{what}"]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[5] = bad
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, str(tmp_path / "model.onnx"))
    with pytest.raises(BuildError, match=said):
        confirm(tmp_path / "model.onnx", proofs_of(baseline_in("fp32"), plan), plan)


def test_a_layer_that_reads_another_tensor_is_refused(
    baseline_in: Callable[[str], Path], right: Callable[[str], Path], plan: Plan, tmp_path: Path
) -> None:
    wrong = changed(right("fp32"), of_another_input, 3, right("fp32").with_name("other.onnx"))
    with pytest.raises(BuildError, match=r"linear layer 3 is wrong: it reads \S+ instead of \S+:"):
        confirm(wrong, proofs_of(baseline_in("fp32"), plan), plan)


def test_a_graph_without_the_layers_is_refused(baseline_in: Callable[[str], Path], plan: Plan) -> None:
    with pytest.raises(
        BuildError, match=r"linear layer 1 is wrong: the graph has no tensor layers\.1\.nbl_linear"
    ):
        confirm(baseline_in("fp32"), proofs_of(baseline_in("fp32"), plan), plan)
    assert isinstance(linear_part(load_graph(baseline_in("fp32")), 1), str)
