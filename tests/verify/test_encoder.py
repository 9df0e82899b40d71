"""An encoder measured part by part: a ragged batch, what fails and where it says so, and what is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from nbl_export import api
from nbl_export.calibrate.text import heldout_rows, load_text
from nbl_export.linearize.plan import LinearLayer, Plan, load_plan
from nbl_export.models.folder import find_pooling, task_named
from nbl_export.models.forward import encoder_of
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.records import to_json
from nbl_export.runtime.torch import TorchEncoder
from nbl_export.settings import NO_BOUND, LossBound, VerifySettings
from nbl_export.verify import measure as module
from nbl_export.verify.case import EncoderCase, Measurement
from nbl_export.verify.loss import loss_checks, measure_likeness, measure_method_loss
from nbl_export.verify.measure import measure_encoder
from nbl_export.verify.parity.figures import EncoderParity, Likeness, Measure, MethodLoss
from nbl_export.workspace import Workspace
from tests.fixtures_graph import maps_in_place, original_logits, plan_by_hand, tensors_of
from tests.linearize.test_loss import log_softmax, losses, ratio_estimate
from tests.processes import Notes
from tests.tiny import (
    CLS,
    LAYERS,
    PAD,
    POSITIONS,
    SEP,
    WIDTH,
    as_sentence_transformer,
    text_encoder,
    write_text,
)
from tests.verify.conftest import with_fault

PARITY = VerifySettings(quality=False, speed=False)
CHOSEN = (0, 2)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> EncoderCase:
    """A sentence-transformers folder with layers 0 and 2 of 4 linear, as far as it is rewritten."""
    place = tmp_path_factory.mktemp("bert")
    folder = as_sentence_transformer(text_encoder(place / "model"))
    source = write_text(place / "text.jsonl")
    out = place / "out"
    settings = api.CalibrateSettings(
        (str(source),), samples=24, seq_len=90, heldout_samples=4, calibration_dtype="float32"
    )
    api.calibrate(folder, out, settings)
    api.select(out, api.SelectSettings(layers=CHOSEN))
    api.export(out)
    api.rewrite(out)
    ws, found = Workspace.open(out), find_model(str(folder))
    plan = load_plan(ws.plan)
    return EncoderCase(
        load_model(found),
        plan,
        ws.baseline,
        ws.model,
        PARITY,
        Notes(),
        task_named(found.task),
        find_pooling(folder),
        heldout_rows(load_text(ws.text), plan.probe),
        "documents",
        PAD,
        tensors=tensors_of(ws.baseline, plan),
    )


def parity_of(found: Measurement) -> EncoderParity:
    assert isinstance(found.parity, EncoderParity)
    return found.parity


def test_a_right_graph_passes_in_every_output(bert: EncoderCase) -> None:
    found = measure_encoder(bert)
    assert [(c.name, c.status) for c in found.checks] == [
        ("parity", "passed"),
        ("method loss", "skipped"),
        ("speed", "skipped"),
    ]
    parity = parity_of(found)
    names = ["last_hidden_state", "pooler_output", "sentence_embedding"]
    assert [o.output for o in parity.outputs] == names
    assert [o.tokens for o in parity.outputs] == [sum(parity.lengths), 4, 4]
    assert found.checks[0].detail == (
        f"max relative difference {parity.worst:.2g} in {', '.join(names)}, within all float32 gates"
    )
    assert (parity.precision, parity.pytorch_in_precision, found.divergence) == ("fp32", None, None)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("nbl_linear.weight", 1.05), ("nbl_linear.bias", 0.0), ("nbl_linear.weight", float("nan"))],
    ids=["a scaled W", "no bias", "NaN"],
)
def test_wrong_maps_fail_and_their_layer_is_named(
    bert: EncoderCase, tmp_path: Path, name: str, factor: float
) -> None:
    wrong = with_fault(bert.rewritten, tmp_path, "layers.2.", name, factor)
    found = measure_encoder(replace(bert, rewritten=wrong))
    check = found.checks[0]
    assert check.status == "failed" and "of last_hidden_state is" in check.detail
    assert found.divergence and "layer 2 (linear)" in found.divergence and found.divergence in check.detail
    assert len(parity_of(found).outputs) == 3


# the batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_rows_are_cut_to_other_lengths_and_keep_their_ends(bert: EncoderCase, left: bool) -> None:
    batch = module._batch(replace(bert, left=left))
    mask, ids = batch["attention_mask"].astype(bool), batch["input_ids"]
    whole = [row["input_ids"][0] for row in bert.heldout]
    lengths = [min(len(row), most) for row, most in zip(whole, (64, 41, 23, 9), strict=True)]
    assert mask.sum(axis=1).tolist() == lengths and len(set(lengths)) > 2
    for row, real, original in zip(ids, mask, whole, strict=True):
        kept = row[real]
        assert kept[0] == CLS and kept[-1] == SEP and (row[~real] == PAD).all()
        assert kept[:-1].tolist() == original[: len(kept) - 1].tolist()
        assert real[-1] if left else real[0]


# loss and speed ----------------------------------------------------------------------------------


def test_one_row_of_each_length_that_the_model_has_positions_for_is_timed(bert: EncoderCase) -> None:
    settings = replace(PARITY, speed=True, contexts=(16, POSITIONS, POSITIONS + 1), rounds=3)
    found = measure_encoder(replace(bert, settings=settings))
    assert found.speed is not None
    assert [(c.phase, c.batch, c.context) for c in found.speed.cells] == [
        ("encode", 1, 16),
        ("encode", 1, POSITIONS),
    ]
    assert all([r.name for r in c.results] == ["base", "linearized"] for c in found.speed.cells)
    assert len(found.notes) == 1 and found.notes[0].startswith(
        f"Speed at {POSITIONS + 1} tokens is not measured"
    )


@pytest.mark.parametrize("layers", [(2, 3), (0, 1, 2, 3, 4)], ids=str)
def test_method_loss_against_numpy(stories_out: Path, stories_model: Any, layers: tuple[int, ...]) -> None:
    plan = plan_by_hand(stories_out, layers)
    text = load_text(Workspace.open(stories_out).text)
    rows, document = text.heldout[:5], text.heldout_document[:5]
    original = [original_logits(stories_model, row) for row in rows]
    with maps_in_place(stories_model, plan):
        changed = [original_logits(stories_model, row) for row in rows]
    # The token that is predicted says which document a figure belongs to.
    owner = document[:, 1:].reshape(-1).tolist()
    mean_kl, kl_se, excess, excess_se = losses(original, changed, rows, document)
    nll = [
        -np.mean([log_softmax(o)[np.arange(len(r) - 1), r[1:]] for o, r in zip(side, rows, strict=True)])
        for side in (original, changed)
    ]
    found = measure_method_loss(stories_model, plan, rows, document)
    assert (found.documents, found.tokens) == (len(set(owner)), 5 * 127)
    assert found.documents > 1
    assert found.perplexity_original == pytest.approx(math.exp(nll[0]), rel=1e-5)
    assert found.perplexity_linearized == pytest.approx(math.exp(nll[1]), rel=1e-5)
    assert found.perplexity_ratio == pytest.approx(math.exp(excess), rel=1e-5)
    assert found.perplexity_ratio_se == pytest.approx(math.exp(excess) * excess_se, rel=1e-4)
    assert found.kl == pytest.approx(mean_kl, rel=1e-4)
    assert found.kl_se == pytest.approx(kl_se, rel=1e-4)
    assert found.perplexity_ratio > 1 and found.kl > 0
    assert set(to_json(found)) == set(type(found).__annotations__)


REPLACED = (1, 2)


def rows(lengths: Sequence[int] = (9, 4, 13)) -> list[dict[str, NDArray[np.int64]]]:
    generator = np.random.default_rng(0)
    tokens = [np.r_[CLS, generator.integers(97, 122, n - 2), SEP][None] for n in lengths]
    return [{"input_ids": ids, "token_type_ids": np.zeros_like(ids)} for ids in tokens]


def made_plan(layers: Sequence[int] = REPLACED) -> Plan:
    generator = np.random.default_rng(1)

    def normal(*shape: int) -> NDArray[np.float32]:
        return (0.3 * generator.standard_normal(shape)).astype(np.float32)

    maps = {i: LinearLayer(normal(WIDTH, WIDTH), normal(WIDTH)) for i in layers}
    return Plan("a" * 64, WIDTH, LAYERS, "normed", "by hand", None, 0, maps, rows()[0], {}, {})


def likeness(folder: Path, plan: Plan, notes: Notes | None = None) -> Likeness:
    source = find_model(str(folder))
    names = {**rows()[0], "attention_mask": np.ones((1, 1), np.int64)}
    encoder = encoder_of(load_model(source), task_named(source.task), find_pooling(folder), names)
    return measure_likeness(TorchEncoder(encoder), plan, rows(), "documents", notes)


def both(
    folder: Path, kind: Any, plan: Plan, of: Callable[[Any], Any]
) -> list[tuple[NDArray[np.float64], ...]]:
    """What ``of`` takes from the outputs of the original and of the changed model, [vectors, d] for each row."""
    found = []
    for layers in ({}, plan.layers):
        model = kind.from_pretrained(folder).eval()
        blocks = getattr(model, "bert", model).encoder.layer
        for index, layer in layers.items():
            w, b = torch.from_numpy(layer.w), torch.from_numpy(layer.b)

            def replaced(_m: Any, args: Any, kwargs: Any, _out: Any, w: Any = w, b: Any = b) -> Any:
                return torch.nn.functional.linear(args[0] if args else kwargs["hidden_states"], w, b), None

            blocks[index].attention.self.register_forward_hook(replaced, with_kwargs=True)
            blocks[index].attention.output.dense = torch.nn.Identity()
        with torch.inference_mode():
            outputs = [of(model(**{n: torch.from_numpy(a) for n, a in row.items()})) for row in rows()]
        found.append([o[0].double().numpy() if o.ndim == 3 else o.double().numpy() for o in outputs])
    return list(zip(*found, strict=True))


def mean_and_error(by_row: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The ratio estimator with rows as the sampling unit, written out."""
    owner = [number for number, row in enumerate(by_row) for _ in row]
    return ratio_estimate(np.concatenate(by_row), np.array(owner))


def cosines(pairs: Sequence[tuple[NDArray[np.float64], ...]]) -> list[list[float]]:
    return [
        [float(x @ y) / math.sqrt(float(x @ x) * float(y @ y)) for x, y in zip(a, b, strict=True)]
        for a, b in pairs
    ]


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_sentence_transformer(text_encoder(tmp_path_factory.mktemp("likeness") / "bert"))


def test_cosines_of_states_and_of_pooled_vectors(pooled: Path) -> None:
    plan, notes = made_plan(), Notes()
    found = likeness(pooled, plan, notes)
    assert (found.documents, found.unit) == (3, "documents")
    assert notes.tasks == [("Measuring method loss", 3, "documents", 0)] and notes.advanced == [1, 1, 1]

    def mean_vector(output: Any) -> Any:
        return output.last_hidden_state.mean(dim=1)

    expected = {
        "cosine of last_hidden_state": (lambda o: o.last_hidden_state, 9 + 4 + 13),
        "cosine of pooler_output": (lambda o: o.pooler_output, 3),
        "cosine of sentence_embedding": (mean_vector, 3),
    }
    assert [m.what for m in found.measures] == list(expected)
    for measure in found.measures:
        of, count = expected[measure.what]
        value, se = mean_and_error(cosines(both(pooled, AutoModel, plan, of)))
        assert measure.count == count
        assert (measure.value, measure.se) == (pytest.approx(value, abs=1e-5), pytest.approx(se, rel=1e-3))
        assert measure.value < 0.99 and measure.se > 0


@pytest.mark.parametrize(
    ("model_class", "kind", "count"),
    [
        ("BertForSequenceClassification", AutoModelForSequenceClassification, 3),
        ("BertForTokenClassification", AutoModelForTokenClassification, 26),
    ],
)
def test_a_head_is_compared_by_its_classes(tmp_path: Path, model_class: str, kind: Any, count: int) -> None:
    folder = text_encoder(tmp_path / "model", "bert", model_class, num_labels=5)
    plan = made_plan()
    agreement, kl = likeness(folder, plan).measures
    assert (agreement.what, kl.what) == ("top-1 agreement", "KL to the original, nats")
    same: list[list[float]] = []
    divergences: list[list[float]] = []
    for a, b in both(folder, kind, plan, lambda o: o.logits):
        p, q = (np.exp(v) / np.exp(v).sum(axis=1, keepdims=True) for v in (a, b))
        same.append([float(x) for x in a.argmax(axis=1) == b.argmax(axis=1)])
        divergences.append([float(x) for x in (p * np.log(p / q)).sum(axis=1)])
    for measure, by_row in ((agreement, same), (kl, divergences)):
        value, se = mean_and_error(by_row)
        assert measure.count == count
        assert (measure.value, measure.se) == (pytest.approx(value, rel=1e-4), pytest.approx(se, rel=1e-3))
    # The divergence is from the original to the changed model, and they do differ.
    assert kl.value > 1e-3


def loss(ratio: float, kl: float) -> MethodLoss:
    return MethodLoss(8, 1016, 4.0, 4.0 * ratio, ratio, 0.01, kl, 0.02)


@pytest.mark.parametrize(
    ("bound", "found", "statuses"),
    [
        (NO_BOUND, loss(9.0, 9.0), {}),
        (LossBound(max_kl=0.42), loss(9.0, 0.42), {"KL bound": "passed"}),
        (LossBound(max_kl=0.42), loss(1.0, 0.4201), {"KL bound": "failed"}),
        (LossBound(None, 1.5), loss(1.5, 9.0), {"perplexity bound": "passed"}),
        (LossBound(None, 1.5), loss(1.5001, 0.0), {"perplexity bound": "failed"}),
        (LossBound(0.1, 1.5), loss(1.6, 0.05), {"perplexity bound": "failed", "KL bound": "passed"}),
        (LossBound(0.1, 1.5), loss(math.nan, math.nan), {"perplexity bound": "failed", "KL bound": "failed"}),
        (LossBound(math.inf), loss(1.0, math.nan), {"KL bound": "failed"}),
        (LossBound(0.0, 1.0), loss(1.0, 0.0), {"perplexity bound": "passed", "KL bound": "passed"}),
    ],
)
def test_bounds(bound: LossBound, found: MethodLoss, statuses: dict[str, str]) -> None:
    checks = {c.name: c.status for c in loss_checks(found, bound) if c.name != "method loss"}
    assert checks == statuses


@pytest.mark.parametrize(("ratio", "kl"), [(math.nan, 0.1), (1.0, math.nan), (math.inf, 0.1)])
def test_a_loss_that_is_no_number_fails_without_a_bound(ratio: float, kl: float) -> None:
    (check,) = loss_checks(loss(ratio, kl), NO_BOUND)
    assert (check.name, check.status) == ("method loss", "failed") and "on held-out data" in check.detail
    assert loss_checks(loss(9.0, 9.0), NO_BOUND) == []


def test_a_likeness_that_is_no_number_fails() -> None:
    like = Likeness(8, "documents", (Measure("cosine of x", 0.9, 0.1, 8), Measure("KL", math.nan, 0.1, 8)))
    assert [c.detail for c in loss_checks(like, NO_BOUND)] == ["KL is nan on held-out data"]
    assert loss_checks(Likeness(8, "documents", like.measures[:1]), NO_BOUND) == []
