"""Layers for a workload: attention where contexts are long, MLPs where they are short; by loss for what they save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from nbl_export import api
from nbl_export.blocks import Mlp, from_json
from nbl_export.errors import BudgetError, InputError
from nbl_export.linearize.plan import Plan
from nbl_export.linearize.selection import per_saving
from nbl_export.report import schema as environment
from nbl_export.verify.speed import roofline
from tests.listening import Notes
from tests.stages.select.by_hand import candidates, forget, select

SHORT, LONG = ("decode=8@8",), ("decode=8@500",)


@pytest.fixture
def out(both_out: Path) -> Path:
    return both_out


def asked(k: int, workload: tuple[str, ...], **more: Any) -> api.SelectSettings:
    return api.SelectSettings(k=k, workload=workload, **more)


def attention(plan: Plan) -> int:
    return sum(not isinstance(block, Mlp) for block in plan.chosen)


def test_layers_are_ranked_by_loss_for_what_they_save(out: Path) -> None:
    notes = Notes()
    plan = api.select(out, asked(3, SHORT, criterion="kl"), listener=notes)
    said = [note for note in notes.notes if note.startswith("Of ")]
    assert len(said) == 1 and "a linear attention saves" in said[0] and "a linear MLP saves" in said[0]
    scored = candidates(out)["candidates"]
    assert all(c["saved_ms"] > 0 for c in scored)
    # All attentions of this model are alike, and so are its MLPs.
    assert len({round(c["saved_ms"], 9) for c in scored}) == 2
    best = sorted(scored, key=lambda c: per_saving(c["kl"], c["saved_ms"]))[:3]
    assert {from_json(c["layer"]) for c in best} == set(plan.chosen)


def test_a_workload_must_run_in_the_graph(out: Path) -> None:
    with pytest.raises(InputError, match=r"decode=8@600 has 608 tokens in a row, and the model has 512"):
        select(out, asked(1, ("decode=8@600",)))
    forget(out, "export")
    with pytest.raises(InputError, match=r"nbl-export export .*"):
        select(out, asked(1, SHORT))


def test_the_machine_is_measured_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the same workload has the same costs; another machine is measured itself."""
    select(out, asked(1, SHORT, criterion="nmse"))
    first = candidates(out)["workload_ms"]
    measured: list[int] = []
    real = roofline.measure_roofline
    monkeypatch.setattr(roofline, "measure_roofline", lambda: measured.append(1) or real())
    select(out, asked(2, SHORT, criterion="nmse"))
    assert candidates(out)["workload_ms"] == first and not measured
    here = environment.environment()
    monkeypatch.setattr(environment, "environment", lambda: replace(here, processor="another"))
    select(out, asked(3, SHORT, criterion="nmse"))
    assert measured


def test_a_speed_that_is_asked_for_is_that_of_the_workload(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def took(base: Path, others: Mapping[str, Path], workloads: Any, *_: Any) -> dict[str, float]:
        assert [w.context for w in workloads] == [200]
        (name,) = others
        return {"base": 100.0, name: 100.0 - 5 * int(others[name].name.split(".")[0][1:])}

    monkeypatch.setattr("nbl_export.verify.speed.workloads.workload_ms", took)
    monkeypatch.setattr("nbl_export.verify.speed.pair.measure_speed", lambda *_: pytest.fail("512 tokens"))
    budget = api.Budget(min_speedup=1.15)
    plan = select(out, api.SelectSettings(workload=("decode=8@200",), criterion="kl", budget=budget))
    assert len(plan.chosen) == 3, "100 / 85"
    curve = candidates(out)["curve"]
    assert curve["context"] is None and curve["points"][2]["timed_speedup"] == pytest.approx(100 / 85)


# sizes -------------------------------------------------------------------------------------------


def graph_of(out: Path) -> Path:
    """The rewritten graph of the plan that was selected."""
    api.rewrite(out)
    return out / "model.onnx"


def weights(path: Path) -> int:
    return sum(numpy_helper.to_array(t).nbytes for t in onnx.load(str(path)).graph.initializer)


def bounded(workload: tuple[str, ...] = (), **budget: str) -> api.SelectSettings:
    return api.SelectSettings(criterion="kl", workload=workload, budget=api.Budget(**budget))


def test_weights_of_at_most_a_size_by_the_fewest_layers(out: Path) -> None:
    whole = weights(out / "baseline" / "model.onnx")
    limit = f"{(whole - 250_000) / 1000:.3f}KB"
    chosen = select(out, bounded(SHORT, max_weight_bytes=limit)).chosen
    assert weights(graph_of(out)) <= whole - 250_000
    fewer = select(out, asked(len(chosen) - 1, SHORT, criterion="kl")).chosen
    assert set(fewer) < set(chosen) and weights(graph_of(out)) > whole - 250_000


def test_a_kv_cache_of_at_most_a_size(out: Path) -> None:
    # Five pairs of 4 heads of size 8 for 2 rows of 500 tokens.
    pair = 2 * 500 * 2 * 4 * 8 * 4
    plan = select(out, bounded(("decode=8@492,batch=2",), max_kv_bytes=f"{3 * pair / 1000:.3f}KB"))
    assert attention(plan) == 2
    curve = candidates(out)["curve"]
    assert curve is None or curve["budget"]["max_kv_bytes"]


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        ({"max_weight_bytes": "1KB"}, BudgetError, "with 10 linear layers there are still"),
        ({"max_weight_bytes": "1GB"}, InputError, "asks for nothing: without a linear layer there are"),
        ({"max_kv_bytes": "1GB"}, InputError, "asks for nothing"),
    ],
)
def test_sizes_out_of_reach_and_sizes_that_are_there(
    out: Path, budget: dict[str, str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        select(out, bounded(SHORT, **budget))
