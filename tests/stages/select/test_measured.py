"""Losses are measured once, kept, measured anew where what they depend on has changed, and shared by processes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export import api
from nbl_export.linearize.loss import LossMeter
from nbl_export.ranks import LostRankError, Ranks
from nbl_export.stages.select import jobs as module
from nbl_export.workspace import Workspace
from tests.listening import Notes
from tests.several import forked
from tests.stages.select.by_hand import candidates, files, forget, same_plan, select

SAME = ("candidates.json", "plan.json", "plan.safetensors")


def test_selection_in_bfloat16_leaves_the_model_and_what_is_solved_in_float32(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = select(out, api.SelectSettings(k=3))
    kl = candidates(out)["candidates"][0]["kl"]
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda *_: "bfloat16")
    forget(out, "select")
    half = select(out, api.SelectSettings(k=3))
    other = candidates(out)["candidates"][0]["kl"]
    assert other == pytest.approx(kl, rel=0.2) and other != kl  # measured anew
    assert same_plan(half, exact)


def test_another_k_measures_nothing_again(out: Path, measured: list[int]) -> None:
    select(out, api.SelectSettings(k=4))
    assert len(measured) >= 5 + 3
    measured.clear()
    for k in (2, 4, 0, 3):
        assert len(select(out, api.SelectSettings(k=k)).chosen) == k
    # Each alone is what greedy search begins with.
    select(out, api.SelectSettings(k=2, criterion="kl"))
    assert measured == []
    select(out, api.SelectSettings(k=5))
    assert len(measured) == 1, "all of them, which was not measured yet"


def test_what_a_loss_depends_on_is_measured_anew(out: Path, measured: list[int]) -> None:
    plain = api.SelectSettings(k=1, criterion="kl")
    select(out, plain)
    # Those chosen by the same maps are measured as they ship.
    for change, count in (
        ({"fit_input": "residual"}, 5),
        ({"fit": "weighted"}, 5),
        ({"ridge": None}, 5),
        ({"repair": 1}, 2),
        ({"fit": "sequential"}, 1),
    ):
        measured.clear()
        select(out, replace(plain, **change))  # type: ignore[arg-type]
        assert len(measured) == count, change
    measured.clear()
    select(out, api.SelectSettings(k=1, criterion="linearity"))
    for c in candidates(out)["candidates"]:
        # A divergence, which chance cannot make negative as it can the likelihood of so little text.
        assert c["sensitivity"] > 0 and c["sensitivity_se"] > 0
        assert c["predicted"] == pytest.approx(c["sensitivity"] * c["nmse"])
    select(out, api.SelectSettings(k=2, criterion="linearity", fit="weighted"))
    assert len(measured) == 5 + 2, "sensitivities depend on no fit; what was predicted of a plan is measured"


def test_an_interrupted_selection_goes_on_to_the_same_result(
    out: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    whole = Path(shutil.copytree(calibrated, tmp_path / "whole"))
    settings = api.SelectSettings(k=4)
    expected = select(whole, settings)
    total = len(measured)
    measured.clear()
    counted = LossMeter.measure_within

    def stops(*args: Any) -> Any:
        if len(measured) == 6:
            raise KeyboardInterrupt
        return counted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(LossMeter, "measure_within", stops)
        with pytest.raises(KeyboardInterrupt):
            select(out, settings)
    assert Workspace.open(out).record("select") is None
    assert same_plan(select(out, settings), expected)
    assert len(measured) == total, "nothing is measured twice"
    assert candidates(out) == candidates(whole)
    one, other = (json.loads((o / "nbl" / "measured.json").read_text()) for o in (out, whole))
    assert one == other


def test_damaged_losses_are_measured_again(out: Path, measured: list[int]) -> None:
    plan = select(out, api.SelectSettings(k=2, criterion="kl"))
    path = out / "nbl" / "measured.json"
    path.write_text(path.read_text()[:100])
    forget(out, "select")
    measured.clear()
    notes = Notes()
    assert same_plan(select(out, api.SelectSettings(k=2, criterion="kl"), notes), plan)
    assert len(measured) == 5 and "measured.json is damaged and was ignored." in notes.notes


# several processes -------------------------------------------------------------------------------


def copy_of(out: Path, to: Path) -> Path:
    return Path(shutil.copytree(out, to, copy_function=shutil.copy2))


def losses(out: Path) -> dict[tuple[str, str], Any]:
    """What was measured, by what it depends on and by name."""
    path = out / "nbl" / "measured.json"
    groups = json.loads(path.read_text())["losses"] if path.exists() else {}
    return {(key, name): loss for key, group in groups.items() for name, loss in group.items()}


def selected(out: Path, settings: api.SelectSettings) -> Any:
    """What a process gets of a selection by all: the chosen layers, and the notes."""
    heard = Notes()
    return api.select(out, settings, heard).chosen, heard.notes


def test_the_plan_and_all_figures_are_those_of_one_process(calibrated: Path, tmp_path: Path) -> None:
    alone, out = copy_of(calibrated, tmp_path / "alone"), copy_of(calibrated, tmp_path / "out")
    settings, count = api.SelectSettings(k=2, criterion="greedy"), 2
    plan = select(alone, settings)
    found = forked(count, tmp_path / "results", lambda _: selected(out, settings))
    assert [chosen for chosen, _ in found] == [plan.chosen] * count
    assert [notes for _, notes in found[1:]] == [[]] * (count - 1)
    assert all(files(out)[name] == files(alone)[name] for name in SAME)
    one, several = losses(alone), losses(out)
    # Several measure some sets of a greedy round that one process can do without.
    assert one.items() <= several.items()


def test_a_killed_process_ends_the_others_and_what_was_measured_is_kept(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, out = copy_of(calibrated, tmp_path / "alone"), copy_of(calibrated, tmp_path / "out")
    settings = api.SelectSettings(k=2, criterion="kl")
    plan, results = select(alone, settings), tmp_path / "results"
    real, calls = module.measured_losses, []

    def work(ranks: Ranks) -> Any:
        def killed(*args: Any) -> Any:
            calls.append(None)
            if len(calls) == 2 and ranks.rank == 1:
                (results / "1").write_bytes(pickle.dumps(None))
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        monkeypatch.setattr(module, "measured_losses", killed)
        selected(out, settings)

    found = forked(2, results, work)
    assert found[1] is None and isinstance(found[0], LostRankError)
    kept = losses(out)
    assert len(kept) == 2 and kept.items() <= losses(alone).items()
    monkeypatch.undo()
    again = select(out, settings)
    assert again.chosen == plan.chosen and np.isfinite(again.layers[plan.chosen[0]].w).all()
