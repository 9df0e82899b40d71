"""Method loss against the textbook, in float64, with NumPy alone; and the bounds that it is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from nbl_export.calibrate.text import load_text
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.models.forward import encoder_of
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.tasks import find_pooling, task_named
from nbl_export.records import to_json
from nbl_export.runtime.torch import TorchEncoder
from nbl_export.settings import NO_BOUND, LossBound
from nbl_export.verify.loss import loss_checks, measure_likeness, measure_method_loss
from nbl_export.verify.parity.figures import Likeness, Measure, MethodLoss
from nbl_export.workspace import Workspace
from tests.encoders import CLS, LAYERS, SEP, WIDTH, as_sentence_transformer, text_encoder
from tests.fixtures_graph import maps_in_place, plan_by_hand
from tests.listening import Notes


def by_hand(values: list[float], owner: list[int]) -> tuple[float, float]:
    """Ratio estimator with documents as the sampling unit, written out."""
    n, mean = len(values), sum(values) / len(values)
    documents = sorted(set(owner))
    residuals = [sum(v - mean for v, o in zip(values, owner, strict=True) if o == d) for d in documents]
    count = len(documents)
    return mean, math.sqrt(count / (count - 1) * sum(r * r for r in residuals)) / n


def log_softmax(logits: Any) -> Any:
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def logits_of(model: Any, row: Any) -> Any:
    with torch.inference_mode():
        return (
            model(input_ids=torch.from_numpy(row.astype(np.int64))[None], use_cache=False).logits[0].numpy()
        )


@pytest.mark.parametrize("layers", [(2, 3), (0, 1, 2, 3, 4)], ids=str)
def test_method_loss_against_numpy(stories_out: Path, stories_model: Any, layers: tuple[int, ...]) -> None:
    plan = plan_by_hand(stories_out, layers)
    text = load_text(Workspace.open(stories_out).text)
    rows, document = text.heldout[:5], text.heldout_document[:5]
    nll: tuple[list[float], list[float]] = ([], [])
    kl: list[float] = []
    owner: list[int] = []
    for row, of in zip(rows, document, strict=True):
        original = log_softmax(logits_of(stories_model, row))
        with maps_in_place(stories_model, plan):
            changed = log_softmax(logits_of(stories_model, row))
        for position in range(len(row) - 1):
            target = row[position + 1]
            nll[0].append(-original[position, target])
            nll[1].append(-changed[position, target])
            p = np.exp(original[position])
            kl.append(float(np.sum(p * (original[position] - changed[position]))))
            # The token that is predicted says which document a figure belongs to.
            owner.append(int(of[position + 1]))
    found = measure_method_loss(stories_model, plan, rows, document)
    difference = [b - a for a, b in zip(*nll, strict=True)]
    excess, excess_se = by_hand(difference, owner)
    mean_kl, kl_se = by_hand(kl, owner)
    assert (found.documents, found.tokens) == (len(set(owner)), 5 * 127)
    assert found.documents > 1
    assert found.perplexity_original == pytest.approx(math.exp(np.mean(nll[0])), rel=1e-5)
    assert found.perplexity_linearized == pytest.approx(math.exp(np.mean(nll[1])), rel=1e-5)
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
    values = [v for row in by_row for v in row]
    mean, count = sum(values) / len(values), len(by_row)
    squares = sum(sum(v - mean for v in row) ** 2 for row in by_row)
    return mean, math.sqrt(count / (count - 1) * squares) / len(values)


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
