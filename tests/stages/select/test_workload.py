"""Layers for a workload: attention where contexts are long, MLPs where they are short; by loss for what they save."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.blocks import Mlp, from_json
from nbl_export.errors import InputError
from nbl_export.linearize.figures import per_saving
from nbl_export.linearize.plan import Plan
from tests.listening import Notes
from tests.stages.select.by_hand import candidates, forget, select

SHORT, LONG = ("decode=8@8",), ("decode=8@8000",)


@pytest.fixture(scope="module")
def both(stories_folder: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which attention and MLPs are calibrated, and that is exported."""
    out = tmp_path_factory.mktemp("workload") / "out"
    text = api.CalibrateSettings((str(stories_text),), 32, 128, heldout_samples=8, blocks="both")
    api.calibrate(stories_folder, out, text)
    api.export(out)
    return out


@pytest.fixture
def out(both: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(both, tmp_path / "out", copy_function=shutil.copy2))


def asked(k: int, workload: tuple[str, ...], **more: Any) -> api.SelectSettings:
    return api.SelectSettings(k=k, workload=workload, **more)


def attention(plan: Plan) -> int:
    return sum(not isinstance(block, Mlp) for block in plan.chosen)


@pytest.mark.parametrize("criterion", ["kl", "greedy"])
def test_what_is_linear_depends_on_what_the_model_is_used_for(out: Path, criterion: str) -> None:
    short = select(out, asked(4, SHORT, criterion=criterion))
    long = select(out, asked(4, LONG, criterion=criterion))
    assert attention(short) < attention(long)


def test_layers_are_ranked_by_loss_for_what_they_save(out: Path) -> None:
    plan = select(out, asked(3, SHORT, criterion="kl"))
    scored = candidates(out)["candidates"]
    assert all(c["saved_ms"] > 0 for c in scored)
    # All attentions of this model are alike, and so are its MLPs.
    assert len({round(c["saved_ms"], 9) for c in scored}) == 2
    best = sorted(scored, key=lambda c: per_saving(c["kl"], c["saved_ms"]))[:3]
    assert {from_json(c["layer"]) for c in best} == set(plan.chosen)


def test_the_curve_says_what_the_workload_gains_at_most(out: Path) -> None:
    select(out, asked(3, SHORT))
    points = candidates(out)["curve"]["points"]
    speedups = [p["workload_speedup"] for p in points]
    assert 1 < speedups[0] < speedups[1] < speedups[2]


def test_what_blocks_save_is_said(out: Path) -> None:
    notes = Notes()
    api.select(out, asked(1, SHORT, criterion="kl"), listener=notes)
    said = [note for note in notes.notes if note.startswith("Of ")]
    assert len(said) == 1 and "a linear attention saves" in said[0] and "a linear MLP saves" in said[0]


def test_without_a_workload_nothing_is_counted(out: Path) -> None:
    select(out, api.SelectSettings(k=1, criterion="kl"))
    assert all(c["saved_ms"] is None for c in candidates(out)["candidates"])


def test_a_graph_must_be_there_to_be_counted(out: Path) -> None:
    forget(out, "export")
    with pytest.raises(InputError, match=r"nbl-export export .*"):
        select(out, asked(1, SHORT))


def test_another_workload_is_another_selection(out: Path) -> None:
    select(out, asked(1, SHORT, criterion="kl"))
    notes = Notes()
    api.select(out, asked(1, LONG, criterion="kl"), listener=notes)
    assert any("made with another workload" in note for note in notes.notes)
