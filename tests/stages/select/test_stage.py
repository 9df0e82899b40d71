"""Selection end to end on stories260K: every way to choose and to fit, what is kept, and what no K can keep."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nbl_export import api
from nbl_export.blocks import Mlp, Span
from nbl_export.errors import InputError
from tests.stages.select.by_hand import QUICK, candidates, select

# every way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        api.SelectSettings(k=2),
        api.SelectSettings(k=2, criterion="linearity"),
        api.SelectSettings(k=2, fit="sequential", repair=2, fit_input="residual"),
        api.SelectSettings(layers=(0, 3), fit="weighted", ridge=None, repair=2),
        api.SelectSettings(k=3, fit="drop", criterion="drop"),
    ],
    ids=lambda s: f"{s.criterion}-{s.fit}-{s.fit_input}",
)
def test_every_way_gives_a_plan_that_rewrites(out: Path, settings: api.SelectSettings) -> None:
    plan = select(out, settings)
    assert len(plan.chosen) == (settings.k or 2)
    assert plan.criterion == ("by hand" if settings.layers else settings.criterion or "greedy")
    assert (plan.fit, plan.repair, plan.ridge) == (settings.fit, settings.repair, settings.ridge)
    known = candidates(out)
    score = {"greedy": "kl", "linearity": "predicted"}.get(plan.criterion, plan.criterion)
    if plan.criterion != "by hand":
        assert all(math.isfinite(c[score]) for c in known["candidates"])
    told = bool(settings.repair or settings.fit == "sequential" or settings.criterion == "linearity")
    assert (known["result"] is not None) is told
    predicted = sum(c["predicted"] or 0.0 for c in known["candidates"] if c["layer"] in plan.chosen)
    assert (known["result"] or {}).get("predicted_excess", 0.0) == pytest.approx(predicted)
    assert ("before_repair" in (known["result"] or {})) is bool(settings.repair)
    if settings.fit == "drop":
        assert not plan.layers and plan.dropped == plan.chosen
    api.rewrite(out)
    report = api.verify(out, QUICK)
    assert report.passed, report.checks
    assert (report.selection.fit, report.selection.repair) == (settings.fit, settings.repair)
    text = (out / "report" / "report.md").read_text()
    assert ("Loss of the chosen layers" in text) is (known["result"] is not None)
    assert ("Loss by K" in text) is (plan.criterion == "greedy")


@pytest.mark.parametrize("criterion", ["kl", "nmse", "cca"])
def test_a_ranking_gives_the_best_first(out: Path, criterion: str, timed: list[int]) -> None:
    plan = select(out, api.SelectSettings(k=2, criterion=criterion))
    best = sorted(candidates(out)["candidates"], key=lambda c: float(c[criterion]))
    assert plan.chosen == tuple(sorted(c["layer"] for c in best[:2]))
    # A budget asks for a curve, in the same order.
    every = select(out, api.SelectSettings(criterion=criterion, budget=api.Budget(max_kl=100.0)))
    assert every.chosen == (0, 1, 2, 3, 4)
    assert candidates(out)["curve"]["points"][1]["layers"] == list(plan.chosen)


# spans -----------------------------------------------------------------------------------------

SPANS = (Span(1, 2), 4, Mlp(3))


@pytest.mark.parametrize(
    "settings",
    [
        api.SelectSettings(layers=SPANS),
        api.SelectSettings(layers=SPANS, rank=8, repair=2),
        api.SelectSettings(layers=SPANS, fit="drop"),
        api.SelectSettings(k=6, workload=("decode=8@64",)),
    ],
    ids=lambda s: (
        f"{s.criterion}-{s.fit}-{s.rank}{'-repair' * bool(s.repair)}{'-workload' * bool(s.workload)}"
    ),
)
def test_spans_are_selected_rewritten_and_verified(all_out: Path, settings: api.SelectSettings) -> None:
    plan = select(all_out, settings)
    if settings.layers:
        assert plan.chosen == (1, Mlp(1), 2, Mlp(2), Mlp(3), 4)
        assert plan.linear == (() if settings.fit == "drop" else (1, Mlp(3), 4))
    else:
        assert 0 < len(plan.chosen) <= (settings.k or 0)
    api.rewrite(all_out)
    report = api.verify(all_out, QUICK)
    assert report.passed, report.checks
    assert report.selection.layers == plan.blocks
    assert set(plan.blocks) == set(settings.layers or plan.blocks) or settings.fit == "drop"
    text = (all_out / "report" / "report.md").read_text()
    if plan.blocks != plan.chosen:
        assert "1-2.span" in text and "in a span" in text
        assert "Spans, each by one map" in text
    assert f"{len(plan.linear_attention)} of 5 attention layers" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (api.SelectSettings(layers=SPANS, fit="sequential"), "--fit sequential is for attentions and MLPs"),
        (api.SelectSettings(k=4, fit_input="residual"), "--fit-input residual is for attentions and MLPs"),
        (api.SelectSettings(k=4, criterion="linearity"), "--criterion linearity is for attentions and MLPs"),
        (
            api.SelectSettings(layers=(Span(3, 7),)),
            r"names 3-7\.span, which is not .* up to 4 of the layers 0, 1,",
        ),
        (api.SelectSettings(k=11), "it must be between 0 and 10"),
    ],
    ids=lambda value: "" if isinstance(value, str) else f"{value.fit}-{value.layers}-{value.k}",
)
def test_spans_that_there_are_not(all_out: Path, settings: api.SelectSettings, words: str) -> None:
    with pytest.raises(InputError, match=words):
        select(all_out, settings)


# budgets -----------------------------------------------------------------------------------------


# encoders ----------------------------------------------------------------------------------------


def test_it_is_kept_of_how_many_tokens_a_single_layers_loss_is(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search measures single layers on a part of the text; what scores layers by it measures them on all."""
    monkeypatch.setattr("nbl_export.linearize.loss._ROUGH_TOKENS", 8)
    told = {}
    for criterion in ("greedy", "kl", "cca"):
        select(out, api.SelectSettings(k=1, criterion=criterion))
        told[criterion] = candidates(out)
    assert told["cca"].get("kl_tokens") is None
    assert told["kl"]["kl_tokens"] == told["greedy"]["curve"]["tokens"]
    assert 8 <= told["greedy"]["kl_tokens"] < told["kl"]["kl_tokens"] / 2
