"""Right activations are proven, in half precision too, and wrong ones are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from nbl_export.calibrate.probe import probe_inputs
from nbl_export.errors import BuildError
from nbl_export.graph.io import load_graph
from nbl_export.graph.regions import Region, find_regions
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite import replace as module
from nbl_export.rewrite.confirm import check_layers, confirm, linear_part
from nbl_export.rewrite.probe_runner import ProbeRunner, relative_error
from nbl_export.rewrite.prove import PROOF_TOLERANCE, Proof, Tolerance, prove
from nbl_export.rewrite.replace import proven_regions, rewrite_file
from tests.finished import PRECISIONS
from tests.fixtures_graph import low_rank, plan_by_hand
from tests.mutations import OF_WEIGHTS, changed, of_another_input

LAYERS = (1, 3)


@pytest.fixture(scope="module")
def graph(stories_out: Path) -> Path:
    return stories_out / "baseline" / "model.onnx"


@pytest.fixture(scope="module")
def regions(graph: Path) -> list[Region]:
    return [r for r in find_regions(load_graph(graph)) if isinstance(r, Region)]


def prove_all(graph: Path, regions: list[Region], plan: Plan) -> dict[int, Proof]:
    return prove(graph, load_graph(graph), regions, plan)


@pytest.fixture(scope="module")
def plan(stories_out: Path) -> Plan:
    return plan_by_hand(stories_out, LAYERS)


@pytest.mark.parametrize("fit_input", ["normed", "residual"])
def test_every_layer_of_the_right_model_is_proven(
    stories_out: Path, graph: Path, regions: list[Region], fit_input: Any
) -> None:
    proofs = prove_all(graph, regions, plan_by_hand(stories_out, (1, 3), fit_input))
    assert sorted(proofs) == [0, 1, 2, 3, 4]
    for proof in proofs.values():
        # Float32 against float32: not zero, and far below the tolerance.
        assert max(proof.input_error, proof.output_error) < 1e-5
        assert proof.holds(PROOF_TOLERANCE["fp32"])


@pytest.mark.parametrize("which", ["probe_u", "probe_y"])
@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda rows: rows[::-1].copy(), id="another token's"),
        pytest.param(lambda rows: rows * np.float32(1.01), id="one percent off"),
        pytest.param(lambda rows: np.where(np.arange(len(rows))[:, None] == 3, np.nan, rows), id="a NaN"),
        pytest.param(lambda rows: np.where(np.arange(len(rows))[:, None] == 0, np.inf, rows), id="infinite"),
        pytest.param(lambda rows: rows[1:], id="a token short"),
        pytest.param(lambda rows: rows[:, :-1], id="another width"),
    ],
)
def test_wrong_activations_are_refused(
    graph: Path, regions: list[Region], plan: Plan, which: str, wrong: Any
) -> None:
    probes = dict(getattr(plan, which))
    probes[3] = wrong(probes[3])
    with pytest.raises(BuildError, match=r"Layer 3 is not proven.*\(input\).*\(output\)") as caught:
        prove_all(graph, regions, replace(plan, **{which: probes}))
    assert "\n" not in str(caught.value)


def test_a_layer_that_stays_need_not_be_proven(graph: Path, regions: list[Region], plan: Plan) -> None:
    probes = dict(plan.probe_y)
    probes[2] = -probes[2]
    proofs = prove_all(graph, regions, replace(plan, probe_y=probes))
    assert not proofs[2].holds(PROOF_TOLERANCE["fp32"]) and proofs[2].output_error == pytest.approx(
        2, abs=1e-4
    )
    assert all(proofs[i].holds(PROOF_TOLERANCE["fp32"]) for i in (0, 1, 3, 4))


# The relative noise of all weights, of those of the attention, and of the MLPs: refused from there on.

# The relative noise of the weights from which on another model is refused.
REFUSED_FROM = {"fp16": 2e-3, "bf16": 2e-2, "int8": 1e-2, "int4": 0.1, "int4-qdq": 0.1}


def noised(model: Any, plan: Plan, level: float, which: str) -> Plan:
    """The plan of another fine-tune: the model's weights, all or those named ``which``, with noise."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    for name, weight in other.named_parameters():
        if weight.ndim == 2 and which in name and "embed" not in name and "lm_head" not in name:
            weight.mul_(1 + level * torch.randn(weight.shape, generator=generator))
    probe = probe_inputs(other, plan.probe)
    return replace(plan, probe_u=probe.x, probe_y=probe.y)


@pytest.mark.parametrize("name", REFUSED_FROM)
def test_a_right_graph_is_proven_within_what_its_rounding_explains(
    baseline_in: Callable[[str], Path], plan: Plan, name: str
) -> None:
    proofs = proven_regions(baseline_in(name), plan).proofs
    flat = PROOF_TOLERANCE[name.partition("-")[0]]
    for proof in proofs.values():
        assert proof.holds(flat) and proof.allowed.y < flat.y
        # The measure is of the right size: neither a blank cheque nor a matter of luck.
        assert 0.3 < proof.output_error / proof.allowed.y < 1
        assert proof.layer == 0 or 0.2 < proof.input_error / proof.allowed.u < 1


@pytest.mark.parametrize(
    ("name", "u", "y"),
    [
        ("fp32", 0.001, 0.001),
        ("fp16", 0.03, 0.03),
        ("bf16", 0.15, 0.15),
        ("int8", 0.75, 0.3),
        ("int4", 0.75, 0.75),
    ],
)
def test_whatever_rounding_explains_a_precision_allows_no_more(name: str, u: float, y: float) -> None:
    most = Proof(0, None, None, u, y, allowed=Tolerance(9.0, 9.0))
    assert most.holds(PROOF_TOLERANCE[name])
    assert not replace(most, input_error=1.001 * u).holds(PROOF_TOLERANCE[name])
    assert not replace(most, output_error=1.001 * y).holds(PROOF_TOLERANCE[name])


@pytest.mark.parametrize(
    ("name", "which"),
    [(n, w) for i, n in enumerate(REFUSED_FROM) for w in ("", ("self_attn", "mlp")[i % 2])],
)
def test_another_fine_tune_is_refused(
    baseline_in: Callable[[str], Path], stories_model: Any, plan: Plan, name: str, which: str
) -> None:
    other = noised(stories_model, plan, REFUSED_FROM[name], which)
    with pytest.raises(BuildError, match="not proven") as caught:
        proven_regions(baseline_in(name), other)
    assert "not of the model" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "step"), [(n, (-1, 1)[i % 2]) for i, n in enumerate(PRECISIONS)])
def test_the_stream_of_the_next_layer_is_not_this_ones(
    baseline_in: Callable[[str], Path], stories_out: Path, name: str, step: int
) -> None:
    """Also if its values were the same in every digit: y does not come out of what is fed there."""
    path, plan = baseline_in(name), plan_by_hand(stories_out, (2,), "residual")
    model = load_graph(path)
    regions = [r for r in find_regions(model) if isinstance(r, Region)]
    other = [replace(r, streams=regions[2 + step].streams[:1]) if r.layer == 2 else r for r in regions]
    assert prove(path, model, regions, plan)[2].u is regions[2].streams[0]
    with pytest.raises(BuildError, match="Layer 2 is not proven"):
        prove(path, model, other, plan)
    if step == 1:  # y is computed from the stream before it, not from the one after it
        same = replace(plan, probe_u={**plan.probe_u, 2: plan.probe_u[3]})
        with pytest.raises(BuildError, match="Layer 2 is not proven"):
            prove(path, model, other, same)


@pytest.mark.parametrize("name", ["int4", "int4-qdq", "bf16"])
def test_activations_one_token_late_are_refused(
    baseline_in: Callable[[str], Path], plan: Plan, name: str
) -> None:
    late = {i: np.roll(u, 1, axis=0) for i, u in plan.probe_u.items()}
    with pytest.raises(BuildError, match="not proven"):
        proven_regions(baseline_in(name), replace(plan, probe_u=late))


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
    regions = {r.layer: r for r in find_regions(model) if isinstance(r, Region)}
    outputs = {i: {o.value.name: o for o in r.outputs} for i, r in regions.items()}
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
        assert len(check.ratios) == 2 and max(check.ratios) < 0.5
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
    proofs = {i: proof.tensors for i, proof in proofs_of(baseline_in(name), plan).items()}
    assert all(c.failure == "" for c in check_layers(tmp_path / "model.onnx", proofs, of_rank))
    other = low_rank(plan, 11)
    assert all("differs by" in c.failure for c in check_layers(tmp_path / "model.onnx", proofs, other))
    assert all(
        "2 products instead of 1" in c.failure for c in check_layers(tmp_path / "model.onnx", proofs, plan)
    )


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_number_that_is_none_is_refused(
    baseline_in: Callable[[str], Path], right: Callable[[str], Path], plan: Plan, tmp_path: Path, what: str
) -> None:
    proto = onnx.load(str(right("fp32")))
    (tensor,) = [t for t in proto.graph.initializer if t.name == f"layers.3.nbl_linear.{what}"]
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.flat[5] = np.nan
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, str(tmp_path / "model.onnx"))
    with pytest.raises(BuildError, match="linear layer 3 differs by inf"):
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


REAL = np.array([[3.0, 4.0], [0.0, 1.0], [2.0, 2.0]], dtype=np.float32)


def layer(path: Path, index: int) -> Region:
    region = find_regions(load_graph(path))[index]
    assert isinstance(region, Region)
    return region


def test_what_is_fed_replaces_all_that_comes_before(stories_out: Path, plan: Plan) -> None:
    path = stories_out / "baseline" / "model.onnx"
    region = layer(path, 2)
    runner = ProbeRunner(path, plan)
    u, y = str(region.inputs[0].name), str(region.outputs[0].value.name)
    (own, *_), rows = runner.run([u, y], {}), runner.run([u], {})
    given = {u: runner.split(plan.probe_u[2], [row[u].shape for row in rows])}
    fed = [runner.run([y], given, other_tokens=other) for other in (False, True)]
    assert all(np.array_equal(a[y], b[y]) for a, b in zip(*fed, strict=True))
    np.testing.assert_allclose(fed[0][0][y], own[y], atol=1e-4)
    # Of the graph's input alone, other tokens are something else.
    other = runner.run([y], {}, other_tokens=True)
    assert not np.allclose(other[0][y], own[y], atol=0.1)


def test_moved_weights_give_other_tensors(baseline_in: Callable[[str], Path], plan: Plan) -> None:
    path = baseline_in("int4")
    y = str(layer(path, 2).outputs[0].value.name)
    runner = ProbeRunner(path, plan)
    once, again = runner.run([y], {}), runner.run([y], {}, nudged=0)
    moved = runner.error([row[y] for row in again], runner.joined([row[y] for row in once]))
    assert 0.02 < moved < 0.7


# relative_error ----------------------------------------------------------------------------------


def test_relative_error_by_hand() -> None:
    assert relative_error(REAL.copy(), REAL) == 0.0
    # ‖REAL‖² = 9 + 16 + 0 + 1 + 4 + 4 = 34; one entry is off by 1.
    off = REAL.copy()
    off[1, 0] = 1.0
    assert relative_error(REAL, off) == pytest.approx(1 / 35**0.5)
    # Every token is off by 1 or more times itself, and the middle one by that: √(1/34) overall, 1 in the median.
    assert relative_error(2 * REAL, REAL) == pytest.approx(1.0)
    assert relative_error(np.zeros_like(REAL), REAL) == pytest.approx(1.0)


def test_a_massive_token_hides_nothing() -> None:
    """Neighbouring layers of SmolLM2: 0.006 to 0.02 apart overall, where one token is a hundred times the others."""
    generator = np.random.default_rng(0)
    h = generator.standard_normal((40, 64)).astype(np.float32)
    h[0] *= 300
    after = h + 0.25 * generator.standard_normal(h.shape).astype(np.float32)
    after[0] = h[0] * 1.001
    overall = np.linalg.norm(after - h) / np.linalg.norm(h)
    assert overall < PROOF_TOLERANCE["fp16"].u
    assert relative_error(after, h) > PROOF_TOLERANCE["bf16"].u
    # One wrong token of forty is still seen by the norm of all.
    wrong = h.copy()
    wrong[0] = h[1]
    assert relative_error(wrong, h) > 0.9


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_relative_error_is_infinite_for_what_is_no_number(bad: float) -> None:
    found, expected = REAL.copy(), REAL.copy()
    found[1, 0] = bad
    expected[2, 1] = bad
    assert relative_error(found, REAL) == float("inf")
    assert relative_error(REAL, expected) == float("inf")
    assert not relative_error(found, REAL) <= PROOF_TOLERANCE["fp32"].u
