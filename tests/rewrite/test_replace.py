"""The rewrite: the graph computes what PyTorch computes with the same maps, and exactly K layers are gone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from nbl_export.calibrate.probe import probe_model
from nbl_export.calibrate.text import load_text
from nbl_export.errors import BuildError, InputError
from nbl_export.graph.io import load_graph
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.linearize.swap import linearized
from nbl_export.rewrite import replace as rewrite_module
from nbl_export.rewrite.prove import PROOF_TOLERANCE
from nbl_export.rewrite.replace import count, proven_regions, rewrite_file, rewrite_summary
from nbl_export.runtime.ort import OrtDecoder
from nbl_export.runtime.stream import PastStream
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.settings.choices import FitInput
from nbl_export.verify.parity.decoder import compare_streams
from nbl_export.verify.parity.figures import gates_for
from nbl_export.workspace import Workspace
from tests.fixtures_graph import low_rank, maps_in_place, pad_left, plan_by_hand, ragged_rows
from tests.listening import Notes
from tests.rewrite.by_hand import assert_clean, baseline, prompts
from tests.sessions import cpu_session, empty_past
from tests.variants import Variant

LAYERS, WIDTH, KV_WIDTH = 5, 64, 32  # stories260K
CHOICES = [(), (0,), (4,), (1, 2), (0, 1, 2, 3, 4)]


def decode(runner: Any, rows: Sequence[Any], steps: int) -> list[Any]:
    """All outputs of a ragged prefill and ``steps`` decode steps, straight from onnxruntime."""
    names = [i.name for i in runner.get_inputs()]
    past = empty_past(runner, len(rows))
    ids, mask, positions = pad_left([r[: len(r) - steps] for r in rows])
    outputs = []
    for step in range(steps + 1):
        if step:
            ids = np.array([[r[len(r) - steps + step - 1]] for r in rows], dtype=np.int64)
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
            positions = positions[:, -1:] + 1
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}
        outputs.append(runner.run(None, {k: v for k, v in feeds.items() if k in names}))
        past = dict(zip(past, outputs[-1][1:], strict=True))
    return outputs


def full_recompute(model: Any, plan: Plan, row: Any) -> Any:
    """The logits of one row with the plan's maps in place of attention outputs; no cache, no padding."""
    with maps_in_place(model, plan), torch.inference_mode():
        return (
            model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False).logits[0].numpy()
        )


def assert_computes_the_plan(path: Path, model: Any, plan: Plan, rows: Sequence[Any], steps: int) -> None:
    outputs = decode(cpu_session(path), rows, steps)
    for number, row in enumerate(rows):
        expected = full_recompute(model, plan, row)
        prefill = len(row) - steps
        np.testing.assert_allclose(outputs[0][0][number, -prefill:], expected[:prefill], rtol=0, atol=1e-3)
        for step in range(steps):
            np.testing.assert_allclose(
                outputs[1 + step][0][number, 0], expected[prefill + step], rtol=0, atol=1e-3
            )


@pytest.mark.parametrize("fit_input", ["normed", "residual"])
@pytest.mark.parametrize("layers", CHOICES, ids=str)
def test_stories(
    stories_out: Path, stories_model: Any, tmp_path: Path, layers: tuple[int, ...], fit_input: FitInput
) -> None:
    plan = plan_by_hand(stories_out, layers, fit_input)
    path = tmp_path / "model.onnx"
    result = rewrite_file(baseline(stories_out), plan, path)
    rows = prompts(stories_out, (40, 27, 12))
    assert_computes_the_plan(path, stories_model, plan, rows, 3)
    with linearized(stories_model, plan):
        reference = PastStream(TorchDecoder(stories_model, plan.chosen))
        parity = compare_streams(reference, PastStream(OrtDecoder(path)), rows, 4, gates_for("float32"))
    assert parity.failures() == []

    kept = [i for i in range(LAYERS) if i not in layers]
    assert_clean(path, kept, LAYERS)
    assert result.files == [path, path.with_name("model.onnx.data")]
    assert result.before.kv_pairs - result.after.kv_pairs == len(layers)
    assert result.after.ops.get("Attention", 0) == len(kept)
    assert sorted(result.proofs) == list(range(LAYERS))
    assert all(p.holds(PROOF_TOLERANCE["fp32"]) for p in result.proofs.values())
    # q and o are d × d, k and v are d × kv; W is d × d, b is d and stays inside the .onnx file.
    saved = 4 * (2 * WIDTH * WIDTH + 2 * WIDTH * KV_WIDTH - WIDTH * WIDTH)
    before, after = (p.with_name("model.onnx.data").stat().st_size for p in (baseline(stories_out), path))
    assert abs(before - after - len(layers) * saved) <= 8192


def random_plan(model: Any, layers: Sequence[int], fit_input: FitInput) -> Plan:
    """Maps need not be fitted to be put in place."""
    tokens = np.stack(ragged_rows((24, 24), model.config.vocab_size))
    probe = probe_model(model, tokens)
    generator = np.random.default_rng(1)
    d, count_ = model.config.hidden_size, model.config.num_hidden_layers

    def linear() -> LinearLayer:
        w, b = generator.standard_normal((d, d)) / d**0.5, generator.standard_normal(d)
        return LinearLayer(w.astype(np.float32), b.astype(np.float32))

    return Plan(
        model="of a test",
        hidden_size=d,
        layer_count=count_,
        fit_input=fit_input,
        criterion="by hand",
        ridge=0.0,
        calibration_tokens=tokens.size,
        layers={i: linear() for i in layers},
        probe={n: getattr(probe, n) for n in ("input_ids", "attention_mask", "position_ids")},
        probe_u=probe.x if fit_input == "normed" else probe.h,
        probe_y=probe.y,
    )


@pytest.mark.parametrize(
    ("layers", "fit_input"), [((0,), "normed"), ((1,), "residual"), ((0, 1), "normed")], ids=str
)
def test_variants(variant: Variant, tmp_path: Path, layers: tuple[int, ...], fit_input: FitInput) -> None:
    plan = random_plan(variant.model, layers, fit_input)
    path = tmp_path / "model.onnx"
    rewrite_file(variant.path, plan, path)
    rows = ragged_rows((11, 8, 5), 50, seed=2)
    assert_computes_the_plan(path, variant.model, plan, rows, 3)
    assert_clean(path, [i for i in range(2) if i not in layers], 2)


# refusals ----------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A target that holds something already; a refusal must leave it."""
    (tmp_path / "model.onnx").write_bytes(b"the old graph")
    (tmp_path / "model.onnx.data").write_bytes(b"the old data")
    return tmp_path / "model.onnx"


def assert_untouched(old: Path) -> None:
    beginnings = {p.name: p.read_bytes()[:32] for p in old.parent.iterdir()}
    assert beginnings == {"model.onnx": b"the old graph", "model.onnx.data": b"the old data"}


def test_a_rewritten_graph_is_refused(stories_out: Path, old: Path) -> None:
    with pytest.raises(InputError, match="already rewritten"):
        rewrite_file(stories_out / "model.onnx", plan_by_hand(stories_out, (1,)), old)
    assert_untouched(old)


def test_a_plan_of_other_weights_is_not_proven(stories_out: Path, stories_model: Any, old: Path) -> None:
    other = copy.deepcopy(stories_model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    plan = plan_by_hand(stories_out, (1, 2))
    probe = probe_model(other, load_text(Workspace.open(stories_out).text).calibration)
    wrong = replace(plan, probe_u=probe.x, probe_y=probe.y)
    with pytest.raises(BuildError, match="Layer 2 is not proven"):
        rewrite_file(baseline(stories_out), wrong, old)
    assert_untouched(old)
    # Layer 1 lies before the difference.
    assert rewrite_file(baseline(stories_out), replace(wrong, layers={1: plan.layers[1]}), old)


@pytest.mark.parametrize("step", ["check_like", "count"])
def test_a_graph_that_fails_the_last_checks_replaces_nothing(
    stories_out: Path, old: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_args: Any, **_options: Any) -> None:
        raise BuildError("refused at the end")

    monkeypatch.setattr(rewrite_module, step, (lambda _source: fail) if step == "check_like" else fail)
    with pytest.raises(BuildError, match="refused at the end"):
        rewrite_file(baseline(stories_out), plan_by_hand(stories_out, (1,)), old)
    assert_untouched(old)


# rank --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit_input", ["normed", "residual"])
def test_maps_of_low_rank_are_written_as_two_factors(
    stories_out: Path, stories_model: Any, tmp_path: Path, fit_input: FitInput
) -> None:
    plan = low_rank(plan_by_hand(stories_out, (1, 3), fit_input), 8)
    path = tmp_path / "model.onnx"
    rewrite_file(baseline(stories_out), plan, path)
    assert_computes_the_plan(path, stories_model, plan, prompts(stories_out, (40, 27, 12)), 3)
    assert_clean(path, [0, 2, 4], LAYERS)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}
    for layer, linear in plan.layers.items():
        assert linear.up is not None and linear.down is not None
        np.testing.assert_array_equal(arrays[f"layers.{layer}.nbl_linear.down_weight"], linear.down.T)
        np.testing.assert_array_equal(arrays[f"layers.{layer}.nbl_linear.weight"], linear.up.T)
    before, after = (p.with_name("model.onnx.data").stat().st_size for p in (baseline(stories_out), path))
    saved = 4 * (2 * WIDTH * WIDTH + 2 * WIDTH * KV_WIDTH - 2 * 8 * WIDTH)
    assert abs(before - after - 2 * saved) <= 8192


def test_count_refuses_what_was_not_planned(stories_out: Path, tmp_path: Path) -> None:
    path, plan = tmp_path / "model.onnx", plan_by_hand(stories_out, (1,))
    rewrite_file(baseline(stories_out), plan, path)
    found = proven_regions(baseline(stories_out), plan)
    count(load_graph(path), path, found, plan)
    for layers in ((), (1, 2)):
        with pytest.raises(BuildError, match="attention layers, expected"):
            count(load_graph(path), path, found, plan_by_hand(stories_out, layers))
    with pytest.raises(BuildError, match="KV pairs, expected"):
        count(load_graph(path), path, replace(found, cached=()), plan)
    proto = onnx.load(str(path), load_external_data=False)
    proto.graph.initializer.append(onnx.helper.make_tensor("dead", onnx.TensorProto.FLOAT, [1], [0.0]))
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(BuildError, match="1 dead initializers, expected 0"):
        count(load_graph(path), path, found, plan)


@pytest.mark.parametrize(("name", "least", "most"), [("int4", 0.05, 0.2), ("int8", 0.002, 0.02)])
def test_what_storing_w_costs_is_said_and_recorded(
    baseline_in: Callable[[str], Path],
    stories_out: Path,
    tmp_path: Path,
    name: str,
    least: float,
    most: float,
) -> None:
    plan, listener = plan_by_hand(stories_out, (1, 3)), Notes()
    result = rewrite_file(baseline_in(name), plan, tmp_path / "model.onnx", listener)
    stored = rewrite_summary(result).stored
    assert [s.layer for s in stored] == [1, 3] and all(least < s.error < most for s in stored)
    (note,) = [note for note in listener.notes if note.startswith("Storing W changes W u by")]
    worst = max(stored, key=lambda s: s.error)
    assert f"most in layer {worst.layer} ({worst.error:.1%})" in note
