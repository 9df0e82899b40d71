"""Several processes give the moments of one, and what they finished is kept for any number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate.collect import store_moments
from nbl_export.calibrate.moments import ARRAYS, Moments, load_moments
from nbl_export.calibrate.store import MomentsFolder
from nbl_export.errors import CalibrationError
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.ranks import ALONE, LostRankError, Ranks
from tests.calibrate.conftest import BLOCKS, LENGTH, ROWS
from tests.interruptions import Recorder, crash
from tests.several import forked


def store_in(folder: Path, every_seconds: float = 3600.0) -> MomentsFolder:
    return MomentsFolder(folder / "moments", folder / "partial", {"model": "of a test"}, every_seconds)


def collected(
    model: Any,
    tokens: np.ndarray,
    folder: Path,
    ranks: Ranks = ALONE,
    listener: Recorder | None = None,
    every_seconds: float = 3600.0,
) -> Recorder:
    listener = listener or Recorder()
    store = store_in(folder, every_seconds)
    store_moments(model, tokens, "f" * 64, store, listener, ranks)
    if ranks.first:
        store.publish()
    return listener


def assert_near(found: Moments, want: Moments) -> None:
    assert set(found.layers) == set(want.layers)
    for index, layer in want.layers.items():
        assert found.layers[index].n == layer.n
        for name in ARRAYS:
            value = getattr(layer, name)
            gap = np.linalg.norm(getattr(found.layers[index], name) - value)
            assert gap <= 1e-12 * np.linalg.norm(value), (index, name)


@pytest.mark.parametrize("count", [2, 6])  # of six, two have no batch
def test_several_processes_give_the_moments_of_one(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path, count: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def work(ranks: Ranks) -> Any:
        listener = collected(model, tokens, out, ranks)
        return listener.start, sum(listener.advanced)

    told = forked(count, tmp_path / "results", work)
    assert_near(load_moments(out / "moments")[0], whole)
    assert sorted(path.name for path in out.iterdir()) == ["moments"]
    # The first counts the tokens of all.
    assert told[0] == ((BLOCKS * ROWS * LENGTH, 0), BLOCKS * ROWS * LENGTH)


def test_an_activation_that_is_no_number_is_named_with_its_row(
    tiny_folder: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    def work(ranks: Ranks) -> Any:
        spoiled = load_model(find_model(str(tiny_folder)))
        if not ranks.first:
            spoiled.model.layers[2].self_attn.o_proj.weight[0] = float("nan")
        collected(spoiled, tokens, tmp_path, ranks)

    _, error = forked(2, tmp_path / "results", work)
    assert isinstance(error, CalibrationError)
    assert "layer 2" in str(error) and "row 8," in str(error)  # where the second process begins


def crashed(
    model: Any, tokens: np.ndarray, folder: Path, count: int, **options: Any
) -> tuple[Path, list[Any]]:
    """Where ``count`` processes crashed in the third block, and their errors."""
    out = folder / "out"
    out.mkdir()
    batches = -(-ROWS * LENGTH // 1024)

    def crashing(ranks: Ranks) -> Any:
        at = 2 * -(-batches // ranks.count) + 1
        collected(model, tokens, out, ranks, Recorder(at, crash), **options)

    return out, forked(count, folder / "crashed", crashing)


@pytest.mark.parametrize(("first", "then"), [(2, 3)])
def test_finished_layers_are_kept_for_any_number_of_processes(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path, first: int, then: int
) -> None:
    out, errors = crashed(model, tokens, tmp_path, first)
    for error in errors:
        assert isinstance(error, RuntimeError)
    kept = {path: path.stat().st_mtime_ns for path in (out / "partial").iterdir()}
    assert sorted(path.name for path in kept) == ["000.safetensors", "001.safetensors"]

    def going_on(ranks: Ranks) -> Any:
        store = store_in(out)
        store_moments(model, tokens, "f" * 64, store, None, ranks)
        # Asked together: the first one's publishing removes the files, and the others may come to it late.
        same = ranks.each(lambda: {path: path.stat().st_mtime_ns for path in kept})
        ranks.shared(lambda: store.publish() and None)
        return same[ranks.rank]

    assert forked(then, tmp_path / "gone_on", going_on) == [kept] * then
    assert_near(load_moments(out / "moments")[0], whole)


@pytest.mark.parametrize(("first", "then"), [(2, 1), (3, 2)])
def test_a_run_goes_on_from_the_states_of_any_number_of_processes(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path, first: int, then: int
) -> None:
    out, errors = crashed(model, tokens, tmp_path, first, every_seconds=0.0)
    for error in errors:
        assert isinstance(error, (RuntimeError, LostRankError))
    states = [f"states.002.{rank}-of-{first}.safetensors" for rank in range(first)]
    assert sorted(path.name for path in (out / "partial").glob("states*")) == states

    def going_on(ranks: Ranks) -> Any:
        runs: list[int] = []
        hook = model.model.layers[1].register_forward_hook(lambda *_: runs.append(1))
        listener = collected(model, tokens, out, ranks)
        hook.remove()
        return runs, listener.start, listener.notes

    for runs, start, notes in forked(then, tmp_path / "gone_on", going_on):
        assert runs == []  # no batch passes the second block again
        assert start == (BLOCKS * ROWS * LENGTH, 2 * ROWS * LENGTH)
        assert notes == ["Calibration goes on at block 2, from the states before it."]
    assert_near(load_moments(out / "moments")[0], whole)
    assert sorted(path.name for path in out.iterdir()) == ["moments"]
