"""Losses are measured once, kept, and measured anew where what they depend on has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export import api
from nbl_export.linearize.loss import LossMeter
from nbl_export.workspace import Workspace
from tests.listening import Notes
from tests.stages.select.by_hand import candidates, forget, same_plan, select


def test_selection_in_bfloat16_leaves_the_model_and_what_is_solved_in_float32(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = select(out, api.SelectSettings(k=3, repair=2))
    kl = candidates(out)["candidates"][0]["kl"]
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda *_: "bfloat16")
    forget(out, "select")
    half = select(out, api.SelectSettings(k=3, repair=2))
    other = candidates(out)["candidates"][0]["kl"]
    assert other == pytest.approx(kl, rel=0.2) and other != kl  # measured anew
    assert half.chosen == exact.chosen
    assert all(np.isfinite(half.layers[i].w).all() for i in half.chosen)
    forget(out, "select")
    plain = select(out, api.SelectSettings(k=3))
    monkeypatch.undo()
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda *_: "float32")
    forget(out, "select")
    assert same_plan(plain, select(out, api.SelectSettings(k=3)))


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

    def stops(*args: Any) -> Any:
        if len(measured) == after:
            raise KeyboardInterrupt
        return counted(*args)

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
