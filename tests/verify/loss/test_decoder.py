"""Method loss against the textbook: per row, in float64, with NumPy alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.calibrate.text import load_text
from nbl_export.linearize.loss import mean_over_documents
from nbl_export.records import to_json
from nbl_export.verify.loss.decoder import measure_method_loss
from nbl_export.workspace import Workspace
from tests.fixtures_graph import maps_in_place, plan_by_hand


def by_hand(values: list[float], owner: list[int]) -> tuple[float, float]:
    """Ratio estimator with documents as the sampling unit, written out."""
    n, mean = len(values), sum(values) / len(values)
    documents = sorted(set(owner))
    residuals = [sum(v - mean for v, o in zip(values, owner, strict=True) if o == d) for d in documents]
    count = len(documents)
    return mean, math.sqrt(count / (count - 1) * sum(r * r for r in residuals)) / n


def test_mean_over_documents_by_hand() -> None:
    # Documents of 2 and 1 tokens, mean 4: residual sums -3 and 3; se = √(2/1 (9 + 9)) / 3 = 2.
    mean, se = mean_over_documents(np.array([2.0, 3.0, 7.0]), np.array([5, 5, 9], dtype=np.int32))
    assert (mean, se) == (pytest.approx(4), pytest.approx(2))


def test_mean_over_documents_against_the_formula() -> None:
    generator = np.random.default_rng(0)
    owner = np.sort(generator.choice([3, 4, 17, 90], size=200)).astype(np.int32)
    values = generator.standard_normal(200) + owner / 50
    found = mean_over_documents(values, owner)
    assert found == pytest.approx(by_hand(values.tolist(), owner.tolist()), rel=1e-12)
    # Which number a document has does not matter, nor in which order tokens come.
    order = generator.permutation(200)
    assert mean_over_documents(values[order], owner[order] * 2 + 1) == pytest.approx(found, rel=1e-12)


def test_tokens_of_one_document_are_no_independent_samples() -> None:
    values = np.repeat([0.0, 1.0], 500)
    owner = np.repeat([0, 1], 500).astype(np.int32)
    assert mean_over_documents(values, owner)[1] == pytest.approx(0.5)
    assert mean_over_documents(values, np.arange(1000, dtype=np.int32))[1] < 0.02


def test_one_document_has_no_standard_error() -> None:
    assert mean_over_documents(np.array([1.0, 2.0]), np.array([4, 4], dtype=np.int32)) == (1.5, 0.0)


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


def test_blocks_before_the_first_linear_layer_run_once(stories_out: Path, stories_model: Any) -> None:
    text, ran = load_text(Workspace.open(stories_out).text), [0] * 5
    hooks = [
        block.register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
        for i, block in enumerate(stories_model.model.layers)
    ]
    try:
        measure_method_loss(
            stories_model, plan_by_hand(stories_out, (2, 3)), text.heldout[:3], text.heldout_document[:3]
        )
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [3, 3, 6, 6, 6]


def test_k_0_costs_nothing(stories_out: Path, stories_model: Any) -> None:
    text = load_text(Workspace.open(stories_out).text)
    found = measure_method_loss(
        stories_model, plan_by_hand(stories_out, ()), text.heldout[:3], text.heldout_document[:3]
    )
    assert (found.perplexity_ratio, found.perplexity_ratio_se, found.kl, found.kl_se) == (1, 0, 0, 0)
    assert found.perplexity_original == found.perplexity_linearized
