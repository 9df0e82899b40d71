"""Likeness of an encoder against transformers' own model with hooks, vector after vector in float64."""

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

from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.models.encoder import encoder_of
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.tasks import find_pooling, task_named
from nbl_export.runtime.torch import TorchEncoder
from nbl_export.verify.loss.encoder import measure_likeness
from nbl_export.verify.loss.figures import Likeness
from tests.encoders import CLS, LAYERS, SEP, WIDTH, as_sentence_transformer, text_encoder
from tests.listening import Notes

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


def test_nothing_replaced_costs_nothing(pooled: Path) -> None:
    for measure in likeness(pooled, made_plan(())).measures:
        assert (measure.value, measure.se) == (pytest.approx(1, abs=1e-12), pytest.approx(0, abs=1e-12))


def test_a_map_that_is_no_number_is_no_likeness(pooled: Path) -> None:
    plan = made_plan()
    plan.layers[1].w[0, 0] = np.nan
    assert all(math.isnan(measure.value) for measure in likeness(pooled, plan).measures)
