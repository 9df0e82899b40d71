"""Selection end to end on stories260K: every way to choose and to fit, what is kept, and what no K can keep."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from nbl_export import api
from nbl_export.calibrate.text import load_text
from nbl_export.errors import BudgetError, InputError
from nbl_export.graph.io import load_graph
from nbl_export.linearize.adapters import Adapter, adapted
from nbl_export.linearize.lmmse import FitName
from nbl_export.linearize.loss import LossMeter
from nbl_export.linearize.plan import LinearLayer, load_plan
from nbl_export.linearize.scores import CRITERIA
from nbl_export.progress import Silent
from nbl_export.stages.select import frontier
from nbl_export.stages.select.frontier import SpeedMeter, Speedups
from nbl_export.workspace import Workspace
from tests.encoders import text_encoder
from tests.fixtures_graph import load, maps_in_place
from tests.interruptions import Recorder, send

QUICK = api.VerifySettings(quality=False, speed=False)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are measured in float32, whatever the processor is fastest in."""
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda: "float32")


@pytest.fixture(scope="module")
def calibrated(stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on little text that was calibrated and exported: the finished one without what came after."""
    out = Path(shutil.copytree(stories_out, tmp_path_factory.mktemp("stages") / "out"))
    forget(out, "select", "rewrite", "verify")
    for path in (
        out / "nbl" / "plan.json",
        out / "nbl" / "plan.safetensors",
        out / "nbl" / "candidates.json",
    ):
        path.unlink()
    return out


@pytest.fixture
def out(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "out", copy_function=shutil.copy2))


def forget(out: Path, *stages: str) -> None:
    record = out / "nbl" / "workspace.json"
    raw = json.loads(record.read_text())
    for stage in stages:
        del raw["stages"][stage]
    record.write_text(json.dumps(raw))


def select(out: Path, settings: api.SelectSettings, listener: Silent | None = None) -> api.Plan:
    """The plan with its maps in memory: one that was read from its file reads what the file has now."""
    plan = api.select(out, settings, listener)
    return replace(
        plan, layers={i: LinearLayer(np.array(m.w), np.array(m.b)) for i, m in plan.layers.items()}
    )


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every measurement of a loss."""
    found: list[int] = []
    plain = LossMeter.measure_within

    def counted(self: LossMeter, change: Any, first: int) -> Any:
        found.append(first)
        return plain(self, change, first)

    monkeypatch.setattr(LossMeter, "measure_within", counted)
    return found


def candidates(out: Path) -> Any:
    return json.loads((out / "nbl" / "candidates.json").read_text())


def files(out: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes() for p in sorted((out / "nbl").iterdir()) if p.is_file() and p.name != ".lock"
    }


def same_plan(a: api.Plan, b: api.Plan) -> bool:
    return a.chosen == b.chosen and all(
        np.array_equal(a.layers[i].w, b.layers[i].w) and np.array_equal(a.layers[i].b, b.layers[i].b)
        for i in a.chosen
    )


NONE: Mapping[str, Adapter] = {}


def kl_by_hand(
    out: Path, model: Any, layers: Mapping[int, LinearLayer], adapters: Mapping[str, Adapter] = NONE
) -> float:
    """Mean KL(original ‖ changed) of the selection text in float64, by whole runs with maps put in place by hand."""
    text = load_text(Workspace.open(out).text)
    ids = torch.from_numpy(text.selection.astype(np.int64))
    plan = replace(load_plan(Workspace.open(out).plan), layers=layers)
    with torch.inference_mode():
        log_p = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        with maps_in_place(model, plan), adapted(model, adapters):
            log_q = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


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
        assert all(not plan.layers[i].w.any() and not plan.layers[i].b.any() for i in plan.chosen)
    api.rewrite(out)
    report = api.verify(out, QUICK)
    assert report.passed, report.checks
    assert (report.selection.fit, report.selection.repair) == (settings.fit, settings.repair)
    text = (out / "report" / "report.md").read_text()
    assert ("Loss of the maps that were kept" in text) is (known["result"] is not None)
    assert ("Loss and speed by K" in text) is (plan.criterion == "greedy")
    (facts,) = api.inspect(out / "nbl" / "plan.json")
    said: dict[str, str] = dict(facts.rows)  # type: ignore[arg-type]
    assert said["fit"] == settings.fit
    assert said["repair"] == (f"{settings.repair} steps" if settings.repair else "none")
    assert said["ridge"] == ("by held-out error" if settings.ridge is None else "1e-06")
    assert api.inspect(out)


def test_scores_and_the_curve_are_those_of_whole_runs(out: Path, stories_folder: Path) -> None:
    model = load(stories_folder)
    plan = select(out, api.SelectSettings(k=5))
    maps, known = plan.layers, candidates(out)
    for c in known["candidates"]:
        assert c["kl"] == pytest.approx(kl_by_hand(out, model, {c["layer"]: maps[c["layer"]]}), rel=5e-3)
        assert c["kl_se"] > 0
    curve = known["curve"]
    text = load_text(Workspace.open(out).text)
    assert curve["tokens"] == text.selection[:, 1:].size
    assert curve["documents"] == len(np.unique(text.selection_document[:, 1:]))
    # The greedy order, by trying everything.
    taken: list[int] = []
    for point in curve["points"]:
        rest = [i for i in maps if i not in taken]
        costs = {i: kl_by_hand(out, model, {j: maps[j] for j in [*taken, i]}) for i in rest}
        taken.append(min(costs, key=lambda i: costs[i]))
        assert point["layers"] == sorted(taken)
        assert point["kl"] == pytest.approx(min(costs.values()), rel=5e-3)
    assert [p["k"] for p in curve["points"]] == [1, 2, 3, 4, 5] and curve["chosen"] == 5


def test_what_the_final_maps_cost_is_measured(out: Path, stories_folder: Path) -> None:
    model = load(stories_folder)
    plan = select(out, api.SelectSettings(k=3, fit="sequential", repair=10))
    result = candidates(out)["result"]
    assert result["loss"]["kl"] == pytest.approx(kl_by_hand(out, model, plan.layers, plan.adapters), rel=5e-3)
    assert len(plan.adapters) == 3 * (5 - min(plan.chosen))  # gate, up and down of the blocks behind
    fitted = select(out, api.SelectSettings(k=3, fit="sequential"))
    assert result["before_repair"]["kl"] == pytest.approx(kl_by_hand(out, model, fitted.layers), rel=5e-3)
    assert candidates(out)["result"]["loss"] == pytest.approx(result["before_repair"])
    assert not same_plan(plan, fitted)
    # The seed decides what the distillation reads.
    assert same_plan(plan, select(out, api.SelectSettings(k=3, fit="sequential", repair=10)))
    assert not same_plan(plan, select(out, api.SelectSettings(k=3, fit="sequential", repair=10, seed=1)))


def test_selection_in_bfloat16_leaves_the_model_and_what_is_solved_in_float32(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = select(out, api.SelectSettings(k=3, repair=2))
    kl = candidates(out)["candidates"][0]["kl"]
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda: "bfloat16")
    forget(out, "select")
    half = select(out, api.SelectSettings(k=3, repair=2))
    other = candidates(out)["candidates"][0]["kl"]
    assert other == pytest.approx(kl, rel=0.2) and other != kl  # measured anew
    assert half.chosen == exact.chosen
    assert all(np.isfinite(half.layers[i].w).all() for i in half.chosen)
    forget(out, "select")
    plain = select(out, api.SelectSettings(k=3))
    monkeypatch.undo()
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda: "float32")
    forget(out, "select")
    assert same_plan(plain, select(out, api.SelectSettings(k=3)))


# what is kept ------------------------------------------------------------------------------------


def test_another_k_measures_nothing_again(out: Path, measured: list[int]) -> None:
    select(out, api.SelectSettings(k=4))
    first = len(measured)
    assert first >= 5 + 3
    measured.clear()
    for k in (2, 4, 0, 3):
        assert len(select(out, api.SelectSettings(k=k)).chosen) == k
    assert measured == []
    # Each alone is what greedy search begins with.
    select(out, api.SelectSettings(k=2, criterion="kl"))
    assert measured == []
    select(out, api.SelectSettings(k=5))
    assert len(measured) == 1, "all of them, which was not measured yet"


def test_what_a_loss_depends_on_is_measured_anew(out: Path, measured: list[int]) -> None:
    select(out, api.SelectSettings(k=1, criterion="kl"))
    for change in ({"fit_input": "residual"}, {"fit": "weighted"}, {"ridge": 1e-3}, {"ridge": None}):
        measured.clear()
        settings = replace(api.SelectSettings(k=1, criterion="kl"), **change)
        select(out, settings)
        assert len(measured) == 5, change
    for change in ({"repair": 1}, {"fit": "sequential"}):  # chosen by the same maps
        measured.clear()
        select(out, replace(api.SelectSettings(k=1, criterion="kl"), **change))
        assert len(measured) == (2 if "repair" in change else 1), "the final maps alone"
    measured.clear()
    select(out, api.SelectSettings(k=1, criterion="linearity"))
    for c in candidates(out)["candidates"]:
        # A divergence, which chance cannot make negative as it can the likelihood of so little text.
        assert c["sensitivity"] > 0 and c["sensitivity_se"] > 0
        assert c["predicted"] == pytest.approx(c["sensitivity"] * c["nmse"])
    select(out, api.SelectSettings(k=2, criterion="linearity", fit="weighted"))
    assert len(measured) == 5 + 2, (
        "sensitivities depend on no fit; what was predicted of each plan is measured"
    )


@pytest.mark.parametrize("after", [0, 3, 6])
def test_an_interrupted_selection_goes_on_to_the_same_result(
    out: Path,
    calibrated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: list[int],
    after: int,
) -> None:
    whole = Path(shutil.copytree(calibrated, tmp_path / "whole"))
    settings = api.SelectSettings(k=4)
    expected = select(whole, settings)
    total = len(measured)
    assert total > after
    measured.clear()
    counted = LossMeter.measure_within

    def stops(self: LossMeter, change: Any, first: int) -> Any:
        if len(measured) == after:
            raise KeyboardInterrupt
        return counted(self, change, first)

    with monkeypatch.context() as patch:
        patch.setattr(LossMeter, "measure_within", stops)
        with pytest.raises(KeyboardInterrupt):
            select(out, settings)
    assert Workspace.open(out).record("select") is None
    assert not [p for p in out.rglob("*") if p.name.endswith(".tmp")]
    found = select(out, settings)
    assert len(measured) == total, "nothing is measured twice"
    assert same_plan(found, expected)
    assert candidates(out) == candidates(whole)
    one, other = (json.loads((o / "nbl" / "measured.json").read_text()) for o in (out, whole))
    assert one == other


class RepairStops(Silent):
    """Interrupts at the given step of a repair."""

    def __init__(self, at: int) -> None:
        self.recorder = Recorder(at, send(signal.SIGINT))

    def task(self, title: str, total: int, unit: str, done: int = 0) -> Any:
        return (self.recorder if title == "Repairing" else super()).task(title, total, unit, done)


def test_an_interrupted_repair_goes_on_and_its_checkpoint_is_gone_in_the_end(
    out: Path, calibrated: Path, tmp_path: Path
) -> None:
    settings = api.SelectSettings(k=2, repair=6)
    whole = Path(shutil.copytree(calibrated, tmp_path / "whole"))
    expected = select(whole, settings)
    with pytest.raises(KeyboardInterrupt):
        select(out, settings, RepairStops(4))
    checkpoint = Workspace.open(out).repair_checkpoint
    assert checkpoint.exists() and Workspace.open(out).record("select") is None
    other = RepairStops(-1)
    select(out, replace(settings, seed=1), other)
    assert other.recorder.start == (6, 0), "another seed is another repair"
    assert not checkpoint.exists()
    with pytest.raises(KeyboardInterrupt):
        select(out, settings, RepairStops(4))
    going_on = RepairStops(-1)
    assert same_plan(select(out, settings, going_on), expected)
    assert going_on.recorder.start == (6, 4)
    assert not checkpoint.exists()


DAMAGES: dict[str, Callable[[str], str]] = {
    "cut short": lambda text: text[: len(text) // 2],
    "no JSON": lambda _: "losses",
    "a list": lambda _: "[1, 2]",
    "another format": lambda text: text.replace("nbl-export/measured/1", "nbl-export/measured/0"),
    "losses that are none": lambda text: text.replace('"kl"', '"lk"', 1),
    "losses that are words": lambda text: json.dumps(
        {**json.loads(text), "losses": {"a": {"0": {"kl": "many", "kl_se": 0, "excess": 0, "excess_se": 0}}}}
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_losses_are_measured_again(out: Path, measured: list[int], name: str) -> None:
    # Two groups of losses with the same names: each is looked at.
    select(out, api.SelectSettings(k=1, fit="drop", criterion="kl"))
    plan = select(out, api.SelectSettings(k=2, criterion="kl"))
    before = candidates(out)
    path = out / "nbl" / "measured.json"
    path.write_text(DAMAGES[name](path.read_text()))
    forget(out, "select")
    measured.clear()
    notes = Notes()
    assert same_plan(select(out, api.SelectSettings(k=2, criterion="kl"), notes), plan)
    assert candidates(out) == before
    assert len(measured) == 5
    if name != "another format":  # that is no damage
        assert "measured.json is damaged and was ignored." in notes.notes
    measured.clear()
    select(out, api.SelectSettings(k=1, criterion="kl"))
    assert measured == []


# budgets -----------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """K layers are 1 + K/10 times as fast; grows by each K that is timed."""
    found: list[int] = []

    def call(self: SpeedMeter, k: int) -> Speedups:
        if k not in self.found:
            found.append(k)
            self.found[k] = Speedups(1 + k / 10, 1 + k / 8)
        return self.found[k]

    monkeypatch.setattr(SpeedMeter, "__call__", call)
    return found


def curve(out: Path) -> list[dict[str, Any]]:
    select(out, api.SelectSettings(k=5))
    points: list[dict[str, Any]] = candidates(out)["curve"]["points"]
    return points


def test_the_largest_k_within_a_budget(out: Path, timed: list[int]) -> None:
    points = curve(out)
    ratios, kls = ([p[name] for p in points] for name in ("perplexity_ratio", "kl"))
    for values, name in ((ratios, "max_perplexity_ratio"), (kls, "max_kl")):
        for bound in [*((a + b) / 2 for a, b in pairwise(values)), max(values) * 1.01, values[2]]:
            if bound < (1 if name == "max_perplexity_ratio" else 0) or min(values) > bound:
                continue
            best = max(p["k"] for p, v in zip(points, values, strict=True) if v <= bound)
            plan = select(out, api.SelectSettings(budget=api.Budget(**{name: bound})))
            assert len(plan.chosen) == best, (name, bound)
            assert list(plan.chosen) == points[best - 1]["layers"]
            said = candidates(out)["curve"]
            assert said["chosen"] == best and said["budget"][name] == bound and said["context"] == 511
            # A few points are timed, among them the chosen one.
            speeds = {p["k"]: (p["prefill_speedup"], p["decode_speedup"]) for p in said["points"]}
            assert speeds[best] == (1 + best / 10, 1 + best / 8)
    both = api.Budget(max_kl=kls[3] * 1.0001, max_perplexity_ratio=max(ratios[0], ratios[1], 1.0) * 1.0001)
    assert len(select(out, api.SelectSettings(budget=both)).chosen) == max(
        p["k"]
        for p in points
        if p["kl"] <= kls[3] * 1.0001 and p["perplexity_ratio"] <= max(ratios[0], ratios[1], 1.0) * 1.0001
    )


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name != "greedy"])
def test_every_criterion_has_a_curve_where_a_budget_asks_for_one(
    out: Path, timed: list[int], criterion: str
) -> None:
    plan = select(out, api.SelectSettings(criterion=criterion, budget=api.Budget(max_kl=100.0)))
    assert plan.chosen == (0, 1, 2, 3, 4)
    points = candidates(out)["curve"]["points"]
    fewer = select(out, api.SelectSettings(k=2, criterion=criterion))
    assert points[1]["layers"] == list(fewer.chosen)


def test_a_budget_that_no_k_keeps_is_one_sentence_and_leaves_the_earlier_plan(
    out: Path, timed: list[int]
) -> None:
    plan, kept = select(out, api.SelectSettings(k=2)), files(out)
    with pytest.raises(BudgetError) as caught:
        select(out, api.SelectSettings(budget=api.Budget(max_kl=1e-9)))
    message = str(caught.value)
    assert caught.value.exit_code == 1
    assert message.startswith("No K keeps the budget: K = 1 costs a KL of ") and message.endswith(
        "or give --k."
    )
    assert "\n" not in message
    left = files(out)
    assert {k: v for k, v in left.items() if k != "measured.json"} == {
        k: v for k, v in kept.items() if k != "measured.json"
    }
    assert same_plan(load_plan(out / "nbl" / "plan.json"), plan)
    notes = Notes()
    select(out, api.SelectSettings(k=2), notes)
    assert notes.notes == ["select: done already, kept."]


@pytest.mark.parametrize(("wanted", "k"), [(1.0, 1), (1.05, 1), (1.25, 3), (1.3, 3), (1.45, 5), (1.5, 5)])
def test_the_smallest_k_that_is_fast_enough_by_bisection(
    out: Path, timed: list[int], wanted: float, k: int
) -> None:
    plan = select(out, api.SelectSettings(budget=api.Budget(min_speedup=wanted)))
    assert len(plan.chosen) == k
    assert plan.chosen == select(out, api.SelectSettings(k=k)).chosen
    assert timed[0] == 5, "whether it can be had at all comes first"


def test_bisection_times_few() -> None:
    for most in (1, 2, 7, 30, 64):
        for least in range(1, most + 1):
            asked: list[int] = []

            class Faked(SpeedMeter):
                def __init__(self, least: int, asked: list[int]) -> None:
                    self.context, self.least, self.asked = 511, least, asked

                def __call__(self, k: int) -> Speedups:
                    self.asked.append(k)
                    return Speedups(2.0, None) if k >= self.least else Speedups(1.0, 9.0)

            assert Faked(least, asked).least_k(1.5, most) == least
            assert len(asked) <= 1 + math.ceil(math.log2(most)) if most > 1 else len(asked) == 1


def test_a_speed_out_of_reach_and_one_that_costs_too_much(out: Path, timed: list[int]) -> None:
    with pytest.raises(BudgetError, match=r"--min-speedup 1\.6 is out of reach at 511 tokens: 5 .* 1\.50"):
        select(out, api.SelectSettings(budget=api.Budget(min_speedup=1.6)))
    points = curve(out)
    between = (points[1]["kl"] + points[2]["kl"]) / 2
    assert points[1]["kl"] < between < points[2]["kl"] < points[3]["kl"]
    with pytest.raises(
        BudgetError, match=r"--min-speedup 1\.35 needs 4 linear layers, and the loss allows 2 \(K = 1 costs"
    ):
        select(out, api.SelectSettings(budget=api.Budget(max_kl=between, min_speedup=1.35)))
    plan = select(out, api.SelectSettings(budget=api.Budget(max_kl=between, min_speedup=1.05)))
    assert len(plan.chosen) == 2, "as many as the loss allows"


def test_a_speed_without_a_graph_names_the_command(out: Path) -> None:
    forget(out, "export")
    with pytest.raises(InputError, match=rf"no finished `export` yet: run `nbl-export export {out}` first"):
        select(out, api.SelectSettings(budget=api.Budget(min_speedup=1.1)))
    # A budget of loss alone is kept without: the curve then has no speeds, and a note says why.
    notes = Notes()
    select(out, api.SelectSettings(budget=api.Budget(max_kl=100.0)), notes)
    assert any(n.startswith("The K curve has no speeds: the model is not exported yet") for n in notes.notes)
    said = candidates(out)["curve"]
    assert said["context"] is None and all(p["prefill_speedup"] is None for p in said["points"])


def test_graphs_are_really_timed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontier, "CONTEXT", 16)
    monkeypatch.setattr(frontier, "ROUNDS", 3)
    before = (out / "baseline" / "model.onnx").read_bytes()
    plan = select(out, api.SelectSettings(criterion="nmse", budget=api.Budget(max_kl=100.0)))
    assert len(plan.chosen) == 5
    said = candidates(out)["curve"]
    speeds = {p["k"]: p["prefill_speedup"] for p in said["points"]}
    assert said["context"] == 16
    assert {k for k, v in speeds.items() if v is not None} == set(frontier.points_of(5, 5))
    assert all(v > 0 for v in speeds.values() if v is not None)
    assert (out / "baseline" / "model.onnx").read_bytes() == before
    assert not [p for p in (out / "nbl").iterdir() if p.is_dir() or p.name.endswith(".tmp")]


def test_points_that_are_timed() -> None:
    assert list(frontier.points_of(1, 1)) == [1]
    assert list(frontier.points_of(3, 0)) == [1, 2, 3]
    assert list(frontier.points_of(32, 9)) == [8, 9, 16, 24, 32]


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
        QUICK,
        notes,
    )
    assert report.passed and report.selection.layers == (0, 1, 2, 3, 4)
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
    assert api.SelectSettings(k=1).for_task("text-generation").criterion == "greedy"
    assert api.SelectSettings(k=1, criterion="cca").for_task("text-generation").criterion == "cca"
    assert api.SelectSettings(k=1).for_task("feature-extraction").criterion == "cca"
    for allowed in (
        api.SelectSettings(k=1, criterion="nmse"),
        api.SelectSettings(k=1, fit="drop"),
        api.SelectSettings(layers=(1,)),
    ):
        allowed.for_task("feature-extraction")


# rank --------------------------------------------------------------------------------------------


def test_maps_of_a_rank_are_two_products_in_the_graph_and_their_cost_is_told(
    out: Path, stories_folder: Path
) -> None:
    whole = select(out, api.SelectSettings(k=2, repair=5))
    plan = select(out, api.SelectSettings(k=2, repair=5, rank=12))
    assert plan.chosen == whole.chosen and plan.rank == 12 and set(plan.adapters) == set(whole.adapters)
    result = candidates(out)["result"]
    for index, layer in plan.layers.items():
        assert np.linalg.matrix_rank(layer.w) == 12 < np.linalg.matrix_rank(whole.layers[index].w)
        assert 0 < result["rank_lost"][str(index)] < 0.5
    model = load(stories_folder)
    for name, maps in (("before_rank", whole.layers), ("loss", plan.layers)):
        by_hand = kl_by_hand(out, model, maps, plan.adapters)
        assert result[name]["kl"] == pytest.approx(by_hand, rel=5e-3)
    assert result["loss"]["kl"] != result["before_rank"]["kl"]
    api.rewrite(out)
    report = api.verify(out, QUICK)
    assert report.passed, report.checks
    graph = load_graph(out / "model.onnx")
    weights = {n: v.shape for n, v in graph.graph.initializers.items() if "nbl_linear" in n}
    for index in plan.chosen:
        assert weights[f"layers.{index}.nbl_linear.down_weight"] == (64, 12)
        assert weights[f"layers.{index}.nbl_linear.weight"] == (12, 64)
    text = (out / "report" / "report.md").read_text()
    assert "W of rank 12, which loses at most" in text and "| of rank 12 |" in text
    (facts,) = api.inspect(out / "nbl" / "plan.json")
    assert dict(facts.rows)["rank"] == "12"  # type: ignore[arg-type]


def test_a_rank_that_makes_nothing_smaller_is_refused(out: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--rank is 32; .* of a model of width 64: give less than 32"):
        select(out, api.SelectSettings(k=2, rank=32))
    for rank in (0, -3):
        with pytest.raises(InputError, match=f"--rank is {rank}; it must be 1 or more"):
            api.SelectSettings(k=2, rank=rank).check()


def test_a_rank_is_refused_before_calibration(stories_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--rank is 40"):
        api.run(stories_folder, tmp_path / "out", api.SelectSettings(k=1, rank=40))
    assert not (tmp_path / "out" / "nbl" / "moments.safetensors").exists()
