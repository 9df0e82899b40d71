"""Selection end to end on stories260K: every way to choose and to fit, what is kept, and what no K can keep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from nbl_export import api
from nbl_export.blocks import Mlp, Span, all_parts, from_json
from nbl_export.calibrate.text import load_text
from nbl_export.errors import InputError
from nbl_export.linearize.scores import CRITERIA
from nbl_export.models.tasks import task_named
from nbl_export.settings import Budget
from nbl_export.settings.choices import FitName
from nbl_export.workspace import Workspace
from tests.encoders import text_encoder
from tests.listening import Notes
from tests.stages.select.by_hand import QUICK, candidates, select

# every way ---------------------------------------------------------------------------------------

EVERY = [
    *(api.SelectSettings(k=2, criterion=name) for name in CRITERIA),
    *(api.SelectSettings(k=2, fit=name) for name in get_args(FitName) if name != "lmmse"),
    api.SelectSettings(k=2, ridge=None),
    api.SelectSettings(k=2, fit="sequential", repair=2, fit_input="residual"),
    api.SelectSettings(layers=(0, 3), fit="weighted", ridge=None, repair=2),
    api.SelectSettings(k=3, fit="drop", criterion="drop"),
]


@pytest.mark.parametrize(
    "settings",
    EVERY,
    ids=lambda s: (
        f"{s.criterion}-{s.fit}-{s.fit_input}{'-auto' * (s.ridge is None)}{'-repair' * bool(s.repair)}"
    ),
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
    (facts,) = api.inspect(out / "nbl" / "plan.json")
    said: dict[str, str] = dict(facts.rows)  # type: ignore[arg-type]
    assert said["fit"] == settings.fit
    assert said["repair"] == (f"{settings.repair} steps" if settings.repair else "none")
    assert said["ridge"] == ("by held-out error" if settings.ridge is None else "1e-06")
    assert api.inspect(out)


# spans -----------------------------------------------------------------------------------------

SPANS = (Span(1, 2), 4, Mlp(3))


@pytest.mark.parametrize(
    "settings",
    [
        api.SelectSettings(layers=SPANS),
        api.SelectSettings(layers=SPANS, repair=2),
        api.SelectSettings(layers=SPANS, rank=8),
        api.SelectSettings(layers=SPANS, fit="weighted", ridge=None),
        api.SelectSettings(layers=SPANS, fit="drop"),
        api.SelectSettings(k=8, criterion="nmse"),
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


def test_a_repair_trains_the_map_of_a_span_and_nothing_that_is_dropped(all_out: Path) -> None:
    before = select(all_out, api.SelectSettings(layers=(Span(1, 2),)))
    after = select(all_out, api.SelectSettings(layers=(Span(1, 2),), repair=8))
    assert after.linear == (1,) and after.dropped == before.dropped == (Mlp(1), 2, Mlp(2))
    assert np.abs(after.layers[1].w - before.layers[1].w).max() > 0
    assert not any(".layers.1.mlp." in name or ".layers.2." in name for name in after.adapters)
    result = candidates(all_out)["result"]
    assert result["loss"]["kl"] < result["before_repair"]["kl"]


def test_a_frontier_has_spans_alone_and_all_together(all_out: Path) -> None:
    workload = ("prefill=64",)
    settings = api.SelectSettings(workload=workload, frontier=True, budget=Budget(max_kl=0.9))
    plan = select(all_out, settings)
    curve = candidates(all_out)["curve"]
    names = [curve["name"], *(line["name"] for line in curve["others"])]
    assert set(names) >= {"attention", "MLPs", "spans", "dropped"}
    points = {line["name"]: line["points"] for line in [curve, *curve["others"]]}
    assert all(
        len(all_parts(map(from_json, point["layers"]))) == point["k"]
        for line in points.values()
        for point in line
    )
    assert any(isinstance(from_json(b), Span) for point in points["spans"] for b in point["layers"])
    chosen = next(point for point in curve["points"] if point["k"] == curve["chosen"])
    assert tuple(map(from_json, chosen["layers"])) == plan.blocks and chosen["kl"] <= 0.9
    # No line is faster within the budget.
    within = [
        p["workload_speedup"] for n, line in points.items() if n != "dropped" for p in line if p["kl"] <= 0.9
    ]
    assert chosen["workload_speedup"] >= max(within) - 1e-9
    api.rewrite(all_out)
    assert api.verify(all_out, QUICK).passed
    text = (all_out / "report" / "report.md").read_text()
    assert "Loss by speed, each way" in text and "| spans |" in text


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


def test_spans_of_moments_without_them(both_out: Path) -> None:
    with pytest.raises(InputError, match="no moments of spans: calibrate with --blocks all"):
        select(both_out, api.SelectSettings(layers=(Span(1, 2),)))


# budgets -----------------------------------------------------------------------------------------


def test_a_whole_run_by_a_budget(
    stories_folder: Path, stories_text: Path, tmp_path: Path, timed: list[int]
) -> None:
    """The graph is exported before layers are chosen, since the curve has its speeds; once."""
    notes = Notes()
    report = api.run(
        stories_folder,
        tmp_path / "out",
        api.SelectSettings(budget=api.Budget(max_kl=100.0)),
        api.CalibrateSettings(
            (str(stories_text),), samples=8, seq_len=64, heldout_samples=2, selection_samples=2
        ),
        api.VerifySettings(speed=False),
        notes,
    )
    assert report.passed and report.selection.layers == (0, 1, 2, 3, 4)
    # The budget is a gate on other text, too.
    assert [c.status for c in report.checks if c.name == "KL bound"] == ["passed"]
    assert timed
    assert "Budget: KL ≤ 100." in (tmp_path / "out" / "report" / "report.md").read_text()


# parts of the text -------------------------------------------------------------------------------


def test_no_part_of_the_text_has_anything_of_another(out: Path) -> None:
    text = load_text(Workspace.open(out).text)
    assert not set(text.selection_document.reshape(-1)) & set(text.heldout_document.reshape(-1))

    def runs(tokens: Any) -> set[tuple[int, ...]]:
        flat = tokens.reshape(-1)
        return {tuple(flat[at : at + 24]) for at in range(len(flat) - 24)}

    parts = [runs(t) for t in (text.calibration, text.selection, text.heldout)]
    # Stories share beginnings ("Once upon a time, there was a little …"), hardly more.
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert len(parts[a] & parts[b]) < 0.02 * min(len(parts[a]), len(parts[b]))


# encoders ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield text_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        *(
            (api.SelectSettings(k=1, criterion=n), f"--criterion {n}")
            for n, c in CRITERIA.items()
            if c.measured
        ),
        (api.SelectSettings(k=1, fit="weighted"), "--fit weighted"),
        (api.SelectSettings(k=1, fit="sequential"), "--fit sequential"),
        (api.SelectSettings(k=1, ridge=None), "--ridge auto"),
        (api.SelectSettings(k=1, repair=3), "--repair"),
        (api.SelectSettings(budget=api.Budget(max_kl=1.0)), "A budget for K"),
        (api.SelectSettings(budget=api.Budget(min_speedup=1.0)), "A budget for K"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_encoder_is_refused_what_only_a_decoder_predicts(
    encoder: Path, tmp_path: Path, settings: api.SelectSettings, what: str
) -> None:
    with pytest.raises(InputError) as caught:
        api.run(encoder, tmp_path / "out", settings, api.CalibrateSettings(("text.jsonl",)))
    message = str(caught.value)
    assert message.startswith(f"{what} is measured by what a decoder predicts; this model is an encoder")
    assert message.endswith("or by --layers.") and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_what_suits_each_task() -> None:
    assert api.SelectSettings(k=1).resolve(task_named("text-generation")).criterion == "greedy"
    assert api.SelectSettings(k=1, criterion="cca").resolve(task_named("text-generation")).criterion == "cca"
    assert api.SelectSettings(k=1).resolve(task_named("feature-extraction")).criterion == "cca"
    for allowed in (
        api.SelectSettings(k=1, criterion="nmse"),
        api.SelectSettings(k=1, fit="drop"),
        api.SelectSettings(layers=(1,)),
    ):
        allowed.resolve(task_named("feature-extraction"))


# rank --------------------------------------------------------------------------------------------


def test_a_rank_is_refused_before_calibration(stories_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--rank is 40"):
        api.run(stories_folder, tmp_path / "out", api.SelectSettings(k=1, rank=40))
    assert not (tmp_path / "out" / "nbl" / "moments").exists()


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
