"""Several processes select what one does, with the same figures to the bit, and each measures its share."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import BudgetError, CalibrationError
from nbl_export.linearize import search
from nbl_export.linearize.loss import LossMeter
from nbl_export.linearize.scores import CRITERIA
from nbl_export.linearize.sweep import Version
from nbl_export.ranks import LostRankError, Ranks
from nbl_export.stages.select import jobs
from nbl_export.workspace import Workspace
from tests.listening import Notes
from tests.several import forked
from tests.stages.select.by_hand import files, same_plan, select

SAME = ("candidates.json", "plan.json", "plan.safetensors")


def copy_of(out: Path, to: Path) -> Path:
    return Path(shutil.copytree(out, to, copy_function=shutil.copy2))


def losses(out: Path) -> dict[tuple[str, str], Any]:
    """What was measured, by what it depends on and by name."""
    path = out / "nbl" / "measured.json"
    groups = json.loads(path.read_text())["losses"] if path.exists() else {}
    return {(key, name): loss for key, group in groups.items() for name, loss in group.items()}


def selected(out: Path, settings: api.SelectSettings, ranks: Ranks) -> Any:
    """What a process gets of a selection by all: the chosen layers, the notes, and how many losses it measured."""
    heard, sets = Notes(), 0
    measure, within = LossMeter.measure_all, LossMeter.measure_within

    def counted(meter: LossMeter, asked: Any) -> Any:
        nonlocal sets
        sets += len(asked)
        return measure(meter, asked)

    def noisy(*args: Any) -> Any:
        nonlocal sets
        sets += 1
        return within(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossMeter, "measure_all", counted)
        if settings.criterion == "linearity":
            patch.setattr(LossMeter, "measure_within", noisy)
        plan = api.select(out, settings, heard)
    return plan.chosen, heard.notes, sets


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("count", [2, 3])
def test_the_plan_and_all_figures_are_those_of_one_process(
    calibrated: Path, tmp_path: Path, criterion: Any, count: int
) -> None:
    alone, out = copy_of(calibrated, tmp_path / "alone"), copy_of(calibrated, tmp_path / "out")
    settings = api.SelectSettings(k=2, criterion=criterion)
    plan = select(alone, settings)
    found = forked(count, tmp_path / "results", lambda ranks: selected(out, settings, ranks))
    assert [chosen for chosen, _, _ in found] == [plan.chosen] * count
    assert [notes for _, notes, _ in found[1:]] == [[]] * (count - 1)
    assert all(files(out)[name] == files(alone)[name] for name in SAME)
    one, several = losses(alone), losses(out)
    # Several measure some sets of a greedy round that one process can do without.
    assert one.items() <= several.items() and (criterion == "greedy" or one == several)
    measured = [sets for _, _, sets in found]
    if criterion == "linearity":
        measured[0] -= 1  # the plan as it ships
    if CRITERIA[criterion].searched:
        assert all(measured)
    elif CRITERIA[criterion].measured:
        assert sorted(measured) == ([2, 3] if count == 2 else [1, 2, 2])


def test_a_model_that_streams_is_swept_once_by_each_process(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps = tmp_path / "sweeps"
    sweeps.mkdir()
    monkeypatch.setattr("nbl_export.models.weights.room", lambda _model: 0)
    monkeypatch.setattr("nbl_export.models.load.fast_dtype", lambda _device: "bfloat16")
    swept = LossMeter.measure_versions

    def counted(meter: LossMeter, versions: list[Version]) -> Any:
        (sweeps / f"{len(list(sweeps.iterdir()))}").write_text(str(len(versions)))
        return swept(meter, versions)

    monkeypatch.setattr(LossMeter, "measure_versions", counted)
    alone, out = copy_of(calibrated, tmp_path / "alone"), copy_of(calibrated, tmp_path / "out")
    settings = api.SelectSettings(k=2, criterion="kl")
    select(alone, settings)
    assert [path.read_text() for path in sweeps.iterdir()] == ["5"]
    shutil.rmtree(sweeps)

    def work(ranks: Ranks) -> Any:
        found: list[int] = []
        monkeypatch.setattr(
            LossMeter, "measure_versions", lambda *args: found.append(len(args[1])) or swept(*args)
        )
        return selected(out, settings, ranks)[0], found

    assert [sizes for _, sizes in forked(2, tmp_path / "results", work)] == [[3], [2]]
    assert all(files(out)[name] == files(alone)[name] for name in SAME) and losses(out) == losses(alone)


def test_what_no_k_meets_is_said_by_all(calibrated: Path, tmp_path: Path) -> None:
    out = copy_of(calibrated, tmp_path / "out")
    settings = api.SelectSettings(budget=api.Budget(max_kl=1e-9))
    errors = forked(2, tmp_path / "results", lambda ranks: selected(out, settings, ranks))
    assert [type(error) for error in errors] == [BudgetError] * 2
    assert str(errors[0]) == str(errors[1])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_and_what_was_measured_is_kept(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    alone, out = copy_of(calibrated, tmp_path / "alone"), copy_of(calibrated, tmp_path / "out")
    settings = api.SelectSettings(k=2, criterion="kl")
    plan, results = select(alone, settings), tmp_path / "results"
    real, calls = jobs.measured_losses, []

    def work(ranks: Ranks) -> Any:
        def killed(*args: Any) -> Any:
            calls.append(None)
            if len(calls) == 2 and ranks.rank == victim:
                (results / str(victim)).write_bytes(pickle.dumps(None))
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        monkeypatch.setattr(jobs, "measured_losses", killed)
        selected(out, settings, ranks)

    found = forked(2, results, work)
    assert found[victim] is None and isinstance(found[1 - victim], LostRankError)
    assert not Workspace.open(out).plan.exists()
    kept = losses(out)
    assert len(kept) == 2 and kept.items() <= losses(alone).items()
    monkeypatch.undo()
    assert same_plan(select(out, settings), plan)


@pytest.mark.parametrize("layer", [1, 2])  # of the second process, and of the first
def test_a_layer_that_cannot_be_fitted_is_named_by_all(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: int
) -> None:
    out = copy_of(calibrated, tmp_path / "out")
    score = jobs.score_layer

    def spoiled(moments: Any, index: int, *how: Any) -> Any:
        if index == layer:
            raise CalibrationError(f"Layer {index} cannot be linearized: it is odd.")
        return score(moments, index, *how)

    monkeypatch.setattr(jobs, "score_layer", spoiled)
    errors = forked(2, tmp_path / "results", lambda ranks: selected(out, api.SelectSettings(k=1), ranks))
    assert [str(error) for error in errors] == [f"Layer {layer} cannot be linearized: it is odd."] * 2
    assert not Workspace.open(out).plan.exists()


def test_what_is_done_is_kept_by_all(calibrated: Path, tmp_path: Path) -> None:
    out = copy_of(calibrated, tmp_path / "out")
    settings = api.SelectSettings(k=2, criterion="cca")
    plan, before = select(out, settings), files(out)
    found = forked(2, tmp_path / "results", lambda ranks: selected(out, settings, ranks))
    assert found == [(plan.chosen, ["select: done already, kept."], 0), (plan.chosen, [], 0)]
    assert files(out) == before


def test_sensitivities_are_measured_once_and_kept_one_after_the_other(
    calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copy_of(calibrated, tmp_path / "out")
    settings, asked = api.SelectSettings(k=2, criterion="linearity"), []
    real = search.sensitivity

    def failing(meter: LossMeter, layer: Any, energy: float) -> Any:
        asked.append(layer.index)
        if len(asked) == 3:
            raise RuntimeError("the power went")
        return real(meter, layer, energy)

    monkeypatch.setattr(jobs, "sensitivity", failing)
    with pytest.raises(RuntimeError):
        select(out, settings)
    select(out, settings)
    assert asked == [0, 1, 2, 2, 3, 4]
