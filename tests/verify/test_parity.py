"""Wrong graphs are refused in every precision and where they leave PyTorch is found; so are images and experts."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from nbl_export.batch import FIRST
from nbl_export.calibrate.text import CalibrationText
from nbl_export.export.forms import FORMS, embedding_form, reading_embeds
from nbl_export.export.torch import export_torch
from nbl_export.graph.embedding import NAME
from nbl_export.graph.io import load_graph, scratch_copy
from nbl_export.graph.precision import precision_of
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.attention import Routers
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.load import load_model
from nbl_export.models.media_tokens import MediaTokens
from nbl_export.models.source import find_model
from nbl_export.models.weights import resident, streaming_of, streams
from nbl_export.progress import Silent
from nbl_export.records import Check
from nbl_export.report.tables import parity_table
from nbl_export.rewrite.confirm import LinearPart, linear_part
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.torch import torch_stream
from nbl_export.verify import measure as module
from nbl_export.verify.case import PROMPTS, DecoderCase, Measurement
from nbl_export.verify.measure import decoder_parity, media_parity, rows_with_media, unlike
from nbl_export.verify.parity.compare import Recorded, Text, compare, record, stepped
from nbl_export.verify.parity.figures import UNMODIFIED, Routing, gates_for
from nbl_export.verify.parity.pytorch import (
    pytorch_in_precision,
    record_pytorch,
    rounding_noise,
    routing_failures,
    routing_of,
)
from nbl_export.verify.parity.unmodified import differences, first_divergence, kept_cache, spliced
from nbl_export.workspace import Workspace
from tests import families
from tests.conftest import exhaustive
from tests.families import WIDTH, Calibrated
from tests.finished import Experts, swap_experts
from tests.fixtures_graph import perturb, plan_by_hand, ragged_rows, recorded, tensors_of
from tests.models.test_weights import reads, stored_in
from tests.mutations import OF_ALL, OF_LAYERS, OF_RETAINED, OF_WEIGHTS, changed
from tests.processes import Notes
from tests.test_families import CORE
from tests.verify.conftest import PARITY, with_fault

LAYERS, RETAINED = (
    (1, 3),
    (0, 2),
)  # the second are numbers among the layers that keep their attention: 0, 2, 4


# What is wrong with W or b itself: tests/rewrite/test_confirm.py, which `verify` asks in the same words.
AGAINST = "against the unmodified graph with the same linear layers, "


QUICK = ("fp16", "bf16", "int8", "int4")


@dataclass(frozen=True)
class Right:
    """A right linearized graph, what it was made of, and its case."""

    number: int  # of its precision
    baseline: Path
    path: Path
    case: DecoderCase

    def failures(self, wrong: Path) -> list[str]:
        case = replace(self.case, rewritten=wrong)
        text = Text(case.rows(PROMPTS), case.settings.decode_steps)
        return differences(
            self.baseline, wrong, case.plan, case.tensors, lambda path: unlike(case, path, text)
        )


def verdict(case: DecoderCase) -> Check:
    found = Measurement()
    decoder_parity(case, found)
    return found.checks[0]


@pytest.fixture(scope="module")
def plan(stories_out: Path) -> Plan:
    return plan_by_hand(stories_out, LAYERS)


@pytest.fixture(scope="module", params=QUICK)
def right(
    request: pytest.FixtureRequest,
    baseline_in: Callable[[str], Path],
    stories_model: Any,
    text: CalibrationText,
    plan: Plan,
    tmp_path_factory: pytest.TempPathFactory,
) -> Right:
    baseline = baseline_in(request.param)
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    rewrite_file(baseline, plan, path)
    tensors = tensors_of(baseline, plan)
    case = DecoderCase(stories_model, plan, baseline, path, PARITY, Silent(), text, tensors=tensors)
    return Right(QUICK.index(request.param), baseline, path, case)


@pytest.mark.parametrize("right", ["fp16", "int4"], indirect=True)
def test_a_right_graph_is_the_unmodified_one_to_rounding(right: Right, plan: Plan) -> None:
    check = verdict(right.case)
    assert check.status == "passed", check.detail
    parts = {i: linear_part(load_graph(right.path), i) for i in LAYERS}
    whole = {i: part for i, part in parts.items() if isinstance(part, LinearPart)}
    rows = right.case.rows(PROMPTS)
    with spliced(right.baseline, whole, right.case.tensors, plan) as reference:
        expected = kept_cache(recorded(ort_stream(reference, 80), rows, 4), plan)
    found = compare(expected, recorded(ort_stream(right.path, 80), rows, 4), gates_for(UNMODIFIED))
    # A tenth of the gates: they are no close call for any precision.
    assert found.worst < gates_for(UNMODIFIED).max_abs_logit / 10
    assert max(s.kv_max_rel for s in found.steps) < gates_for(UNMODIFIED).max_rel_kv / 10
    assert not list(right.path.parent.glob(".*")) and not list(right.baseline.parent.glob(".*"))


@pytest.mark.parametrize("what", OF_LAYERS)
def test_a_layer_at_the_wrong_place_is_refused(right: Right, what: str) -> None:
    """Every mutation in every precision, in one layer or the other: all of them, scripts/mutation_table.py."""
    layer = LAYERS[(right.number + list(OF_LAYERS).index(what)) % 2]
    found = right.failures(changed(right.path, OF_LAYERS[what], layer, right.path.with_name("wrong.onnx")))
    named = AGAINST if what.startswith("layer") else f"linear layer {layer} is wrong: it reads"
    assert named in " ".join(found)


@pytest.mark.parametrize("what", OF_RETAINED)
def test_a_fault_in_a_layer_that_stays_is_refused(right: Right, what: str) -> None:
    number = RETAINED[(right.number + list(OF_RETAINED).index(what)) % 2]
    found = right.failures(changed(right.path, OF_RETAINED[what], number, right.path.with_name("wrong.onnx")))
    assert len(found) == 1 and AGAINST in found[0]


@pytest.mark.parametrize("what", OF_ALL)
def test_a_fault_in_all_layers_is_refused(right: Right, what: str) -> None:
    found = right.failures(changed(right.path, OF_ALL[what], 0, right.path.with_name("wrong.onnx")))
    assert found and AGAINST in found[0]


@pytest.mark.parametrize("right", ["fp16", "int4"], indirect=True)
def test_verify_says_so(right: Right, plan: Plan, tmp_path: Path) -> None:
    """All the way, with the gates that compare with PyTorch."""
    rewrite_file(right.baseline, OF_WEIGHTS["W × 1.1"](plan, 3), tmp_path / "model.onnx")
    check = verdict(replace(right.case, rewritten=tmp_path / "model.onnx"))
    assert (
        check.status == "failed"
        and "the linear layer 3 differs by 1.0e-01 from the plan's W u" in check.detail
    )


# The finished run: layers 2 and 3 of 0 … 4 are linear.
FAULTS = [
    pytest.param("layers.1.", "down_proj", (2, "input", "linear"), id="MLP of layer 1"),
    pytest.param("layers.2.", "nbl_linear.weight", (2, "output", "linear"), id="W of layer 2"),
    pytest.param("layers.3.", "nbl_linear.weight", (3, "output", "linear"), id="W of layer 3"),
    pytest.param("layers.1.", "o_proj", (1, "output", "attention"), id="o_proj of layer 1"),
    pytest.param("layers.0.", "v_proj", (0, "output", "attention"), id="v_proj of layer 0"),
    pytest.param("layers.3.", "gate_proj", (4, "input", "attention"), id="MLP of layer 3"),
    pytest.param("layers.4.", "up_proj", None, id="MLP of the last layer"),
]


def weight_of(path: Path, layer: str, name: str) -> str:
    names = [t.name for t in onnx.load(str(path), load_external_data=False).graph.initializer]
    (found,) = [n for n in names if layer in n and name in n]
    return found


@pytest.fixture
def done(stories_out: Path) -> Any:
    found = load_plan(Workspace.open(stories_out).plan)
    assert found.chosen == (2, 3)
    return found


@pytest.mark.parametrize(("layer", "name", "expected"), FAULTS)
def test_the_fault_is_found(
    stories_copy: Path, stories_model: Any, done: Any, layer: str, name: str, expected: tuple[Any, ...] | None
) -> None:
    path = stories_copy / "model.onnx"
    perturb(path, weight_of(path, layer, name), 1.5)
    found = first_divergence(stories_model, done, path)
    if expected is None:
        assert found is None
        return
    number, where, kind = expected
    assert found is not None and found.startswith(f"layer {number} ({kind}) is the first")
    assert f"tolerance, at its {where}" in found and float(found.split()[-2]) > 1e-3


ROWS = ragged_rows((20, 13, 9), 500)


STEPS = 3


def same(a: Any, b: Any) -> None:
    assert (a.kv_layers, a.lengths) == (b.kv_layers, b.lengths)
    steps = (itertools.chain(*side.batches) for side in (a, b))
    for one, other in zip(*steps, strict=True):
        assert one.logits.shape == other.logits.shape and np.array_equal(one.logits, other.logits)
        assert (one.kept is None) == (other.kept is None)
        if one.kept is not None:
            assert np.array_equal(one.kept[1], other.kept[1])
            for pair, others in zip(one.kept[0], other.kept[0], strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(pair, others, strict=True))


@pytest.fixture
def streaming(stories_folder: Path, tmp_path: Path) -> Any:
    """A model that is read when it is needed: its weights are stored in half precision."""
    folder = shutil.copytree(stories_folder, tmp_path / "model")
    model = load_model(find_model(str(stored_in(folder, torch.bfloat16))))
    dummy_run(model)  # which reads it too, at the first call
    return model


def step_by_step(model: Any, plan: Plan | None, text: Text) -> Recorded:
    """Each pass of the whole model, with transformers' cache between them."""
    with linearized(model, plan) if plan else nullcontext():
        stream = torch_stream(model, plan.linear_attention if plan else (), text.cached)
        return record(stepped(stream, text), stream.kv_layers, text)


@pytest.mark.parametrize(
    ("planned", "cached"),
    [(True, True), (True, False), (False, False)],
    ids=["cache", "no cache", "as it is"],
)
def test_by_blocks_as_step_by_step(streaming: Any, plan: Plan, planned: bool, cached: bool) -> None:
    text = Text(ROWS, STEPS, ragged_rows((90, 30), 500, seed=1), cached)
    blocks, asked = Notes(), plan if planned else None
    assert streams(streaming)
    with reads() as found:
        by_blocks = record_pytorch(streaming, asked, text, listener=blocks)
    read = [weight.name for unit in streaming_of(streaming).units for weight in unit]
    assert sorted(found) == sorted(read * 3)  # once a batch
    with resident(streaming):
        same(step_by_step(streaming, asked, text), by_blocks)
    assert by_blocks.kv_layers == (((0, 2, 4) if planned else (0, 1, 2, 3, 4)) if cached else None)
    steps = ("Running PyTorch", 3 * (STEPS + 1), "steps", 0)
    assert blocks.tasks == [steps, *[("Running the blocks", 5, "blocks", 0)] * 3]
    assert blocks.advanced == [1] * 3 * (5 + STEPS + 1)
    # The last 64 logits of a prefill, and the caches once all is decoded.
    ragged = sum(map(len, ROWS)) - 3 * STEPS
    logits = [[len(step.logits) for step in steps] for steps in by_blocks.batches]
    assert logits == [[ragged, 3, 3, 3], [64, 1, 1, 1], [27, 1, 1, 1]]
    kept = [[step.kept is not None for step in steps] for steps in by_blocks.batches]
    assert kept == [[True] * 4, *[[False] * 3 + [True]] * 2]


@pytest.mark.parametrize(
    "name", [n if n in CORE else pytest.param(n, marks=exhaustive) for n in families.DECODERS]
)
def test_every_decoder_with_the_cache_that_it_has(name: str) -> None:
    model = families.unsaved(name).eval()
    cached = all(block.kv or block.states for block in dummy_run(model).cache)
    text = Text(ragged_rows((12, 9), 250), 2, cached=cached)
    same(record_pytorch(model, None, text), step_by_step(model, None, text))


def by_hand(folder: Path, dtype: torch.dtype, plan: Plan) -> list[NDArray[np.float64]]:
    """Logits [sequence, vocab] of each row by transformers' own model in ``dtype``, with hooks for the maps."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for index, layer in plan.layers.items():
        w, b = (torch.from_numpy(a).to(dtype) for a in (layer.w, layer.b))

        def overwrite(_m: Any, args: Any, kwargs: Any, output: Any, w: Any = w, b: Any = b) -> Any:
            u = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return (torch.nn.functional.linear(u, w, b), *output[1:])

        model.model.layers[index].self_attn.register_forward_hook(overwrite, with_kwargs=True)
    with torch.inference_mode():
        ids = [torch.from_numpy(row.astype(np.int64))[None] for row in ROWS]
        return [model(input_ids=i, use_cache=False).logits[0].double().numpy() for i in ids]


@pytest.mark.parametrize(
    ("name", "dtype", "cached"), [("fp16", torch.float16, True), ("bf16", torch.bfloat16, False)]
)
def test_the_loss_is_that_of_transformers_in_half(
    stories_folder: Path, stories_model: Any, plan: Plan, name: str, dtype: torch.dtype, cached: bool
) -> None:
    text, precision = Text(ROWS, STEPS, cached=cached), precision_of(name)
    exact = record_pytorch(stories_model, plan, text)
    own = pytorch_in_precision(precision, stories_model, plan, text, exact)
    assert own.prompt_lengths == (17, 10, 6) and [s.step for s in own.steps] == [0, 1, 2, 3]
    assert own.gates == gates_for(precision.gates)
    single, half = (by_hand(stories_folder, d, plan) for d in (torch.float32, dtype))
    lost = [np.abs(a - b) for a, b in zip(single, half, strict=True)]
    for step in own.steps:
        # The prompt's positions, or the one whose token is taught in this step.
        parts = [d[-STEPS - 1 + step.step :][:1] if step.step else d[: len(d) - STEPS] for d in lost]
        expected = np.concatenate(parts)
        assert step.tokens == len(expected)
        # Attention in another order rounds otherwise, in each number; on average it costs the same.
        assert step.mean_abs == pytest.approx(expected.mean(), rel=0.4)
    for model in (stories_model, *stories_model.model.layers):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {type(block.self_attn).__name__ for block in stories_model.model.layers} == {"LlamaAttention"}


def test_noise_is_of_the_embeddings_last_bit(stories_model: Any) -> None:
    """A last bit a thousand times larger moves the logits about a thousand times as much."""
    ids = torch.from_numpy(ROWS[0].astype(np.int64))[None]
    table = stories_model.get_input_embeddings().weight[ids]
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, table.shape, generator=generator) * 2 - 1
    with torch.inference_mode():
        exact = stories_model(inputs_embeds=table, use_cache=False).logits
        moved = stories_model(inputs_embeds=table * (1 + signs * 2.0**-13), use_cache=False).logits
    expected = float((moved - exact).abs().max()) / 2**10
    # Rounding within the model adds its own, so only the order of magnitude is asked.
    assert expected / 10 < rounding_noise(stories_model, ROWS[:1]) < expected * 10


def of_two_by_two() -> MediaTokens:
    """Two images of 2 x 2, seen in both directions."""
    features = np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32) * 0.3
    offsets = np.tile([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]], (2, 1)).astype(np.int32)
    steps = np.tile([0, 0, 0, 2], 2).astype(np.int32)
    return MediaTokens(
        features=features,
        later=np.zeros((8, 0, WIDTH), np.float32),
        offsets=offsets,
        steps=steps,
        block=np.repeat([0, 1], 4).astype(np.int32),
        stand_in=np.zeros(8, np.int32),
        both_ways=np.ones(1, np.int32),
    )


def test_rows_go_on_after_their_first_image() -> None:
    heldout = np.arange(3 * 90, dtype=np.int32).reshape(3, 90) % 200
    heldout[1, 20:24] = heldout[1, 50:54] = FIRST + np.arange(4)
    heldout[2, 86:90] = FIRST + np.arange(4)
    assert [len(row) for row in rows_with_media(heldout)] == [24 + 32, 90]
    assert rows_with_media(heldout[:1]) == []


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("qwen2.5-vl", "static"),
        pytest.param("gemma3", "shared", marks=exhaustive),
        pytest.param("gemma4", "concat", marks=exhaustive),
    ],
)
def test_right_and_wrong(
    name: str,
    form: str,
    wrapper: Callable[[str], Calibrated],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, images = wrapper(name), of_two_by_two()
    if name != "qwen2.5-vl":
        images = replace(images, offsets=images.offsets[:, :1] * 0, steps=images.steps * 0 + 1)
    export_torch(case.model, tmp_path / NAME, form=embedding_form(case.model))
    baseline, graph = tmp_path / "baseline" / "model.onnx", tmp_path / "model.onnx"
    export_torch(case.model, baseline, form=reading_embeds(FORMS[form], case.model))
    plan = case.plan((2,))
    rewrite_file(baseline, plan, graph)
    rows = [np.random.default_rng(i).integers(3, 250, 30).astype(np.int32) for i in range(2)]
    rows[0][5:9], rows[1][12:16] = FIRST + np.arange(4), FIRST + 4 + np.arange(4)
    gates = gates_for("float32")
    assert media_parity(case.model, plan, graph, rows, images, gates).failures() == []
    assert media_parity(case.model, plan, baseline, rows, images, gates).failures()

    plain = module._by_graph
    wrong = {"features": images.features + 1e-2}
    if name.startswith("qwen"):
        wrong["offsets"] = images.offsets * 0
        wrong["steps"] = images.steps + 1
    if name == "gemma4":
        wrong["stand_in"] = images.stand_in + 5
    for field, value in wrong.items():
        other = replace(images, **{field: value})
        monkeypatch.setattr(module, "_by_graph", lambda d, r, _i, other=other: plain(d, r, other))
        assert media_parity(case.model, plan, graph, rows, images, gates).failures(), field


@pytest.fixture(scope="module")
def rewritten(experts: Experts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experts.rewritten("fp16", tmp_path_factory.mktemp("rewritten"))


def test_the_graphs_choices_are_taken_and_said(
    experts: Experts, rewritten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, found = experts.verified("fp16", rewritten), Measurement()
    parity = decoder_parity(case, found)
    assert [check.status for check in found.checks] == ["passed"]
    routing = parity.routing
    assert routing is not None and routing.differing > 10 and 0 < routing.worst < 1
    # Every token of every pass at each of the three routers.
    assert routing.choices == 3 * sum(step.tokens for step in parity.steps)
    assert f"{routing.differing:,} of {routing.choices:,} choices of experts" in parity_table(parity).note
    # Without them, the figures are those of other experts.
    monkeypatch.setattr(module, "is_routed", lambda _model: False)
    untold = decoder_parity(case, found)
    assert untold.routing is None and found.checks[1].status == "failed"
    assert untold.mean_abs > 10 * parity.mean_abs


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_wrong_layers_fail(experts: Experts, rewritten: Path, tmp_path: Path, name: str) -> None:
    path = with_fault(
        rewritten, tmp_path, "layers.1.", f"nbl_linear.{name}", 1.1 if name == "weight" else 0.0
    )
    found = Measurement()
    decoder_parity(experts.verified("fp16", path), found)
    (check,) = found.checks
    assert check.status == "failed" and "the linear layer 1 differs" in check.detail


def test_tokens_that_go_to_wrong_experts_fail_by_their_scores(experts: Experts, rewritten: Path) -> None:
    found = Measurement()
    with scratch_copy(rewritten, swap_experts) as wrong:
        parity = decoder_parity(experts.verified("fp16", wrong), found)
    assert parity.routing is not None and parity.routing.worst > 10
    assert "to experts whose scores fall short by" in found.checks[0].detail


def test_passes_are_padded_as_streams_pad_them() -> None:
    rows = [np.zeros(n, np.int32) for n in (4, 3)]
    first, step, alone, last = Text(rows, 1, [rows[1]]).real()
    assert first.tolist() == [[True, True, True], [False, True, True]]
    assert Text(rows, 1).real(left=False)[0].tolist() == [[True, True, True], [True, True, False]]
    assert step.shape == (2, 1) and alone.shape == (1, 2) and last.shape == (1, 1)
    assert Text(rows, 1, cached=False).real()[1].tolist() == [[True] * 4, [False, True, True, True]]


def test_a_choice_is_judged_by_what_rounding_moves() -> None:
    real, scores = [np.ones((1, 2), bool)], torch.tensor([[4.0, 3.0], [1.0, 2.0]])

    def ran(told: list[list[np.ndarray]] | None) -> Routers:  # type: ignore[type-arg]
        routers = Routers(real, told)
        with routers:
            routers.begin()
            scores.topk(1)
        return routers

    own, told = ran(None), ran([[np.array([[1], [1]])]])
    found = routing_of(own, told, [0.5])
    assert found == Routing(2, 1, pytest.approx(1 / 0.75)) and "by 1.33 times" in routing_failures(found)[0]
    assert routing_failures(routing_of(own, told, [1.0])) == []
    assert routing_of(own, told, []).worst > 100  # of float32
    assert routing_of(own, as_own(own), [0.5]) == Routing(2, 0, 0)


def as_own(own: Routers) -> Routers:
    routers = Routers(own.real, own.chosen())
    routers.passes = own.passes
    return routers
