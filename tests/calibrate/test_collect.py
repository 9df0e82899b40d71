"""Calibration sums what the model computes; no stop, no lack of memory and no number of processes changes it."""

from __future__ import annotations

import json
import re
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from nbl_export.blocks import spans_of
from nbl_export.calibrate.collect import collect_moments, store_moments
from nbl_export.calibrate.moments import ARRAYS, Accumulator, Moments, load_moments
from nbl_export.calibrate.store import MomentsFolder
from nbl_export.errors import CalibrationError
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.load import in_precision, load_model
from nbl_export.models.source import find_model
from nbl_export.ranks import ALONE, LostRankError, Ranks
from nbl_export.settings import CalibrateSettings
from nbl_export.stages.needs import disk_to_calibrate, sizes_of
from tests.calibrate.conftest import BLOCKS, LENGTH, ROWS
from tests.interruptions import Recorder, crash, send
from tests.several import forked
from tests.tiny_types import activations

FINGERPRINT = "f" * 64


@pytest.fixture(scope="module")
def batches(model: Any, tokens: np.ndarray) -> int:
    """How many batches an uninterrupted run takes, over all blocks."""
    listener = Recorder()
    collect_moments(model, tokens, listener)
    assert len(listener.advanced) >= 4 * BLOCKS
    assert listener.advanced[-1] < listener.advanced[0]
    return len(listener.advanced)


def assert_same(one: Moments, other: Moments) -> None:
    assert set(one.layers) == set(other.layers)
    for index, layer in one.layers.items():
        assert layer.n == other.layers[index].n
        for name in ARRAYS:
            np.testing.assert_array_equal(
                getattr(layer, name), getattr(other.layers[index], name), err_msg=f"{index}.{name}"
            )


def test_moments_are_those_of_the_activations(model: Any, tokens: np.ndarray) -> None:
    # Captured in the same run by hooks of our own, at other modules than the product's.
    dummy_run(model)
    ids: list[torch.Tensor] = []
    handle = model.model.embed_tokens.register_forward_pre_hook(lambda _m, args: ids.append(args[0]))
    with activations(model) as kept:
        moments = collect_moments(model, tokens)
    handle.remove()
    np.testing.assert_array_equal(torch.cat(ids).numpy(), np.concatenate([tokens] * BLOCKS))
    assert set(moments.layers) == {0, 1, 2, 3}
    for index, layer in moments.layers.items():
        h, x, y = (torch.cat(kept[index][name]).reshape(-1, 32).double().numpy() for name in "hxy")
        assert layer.n == len(h) == ROWS * LENGTH
        want = {"h": h.sum(0), "x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "yx": y.T @ x}
        want |= {"yy": y.T @ y, "hh": h.T @ h, "yh": y.T @ h}
        size = {"h": abs(h).sum(0), "x": abs(x).sum(0), "y": abs(y).sum(0), "xx": abs(x).T @ abs(x)}
        size |= {"yx": abs(y).T @ abs(x), "yy": abs(y).T @ abs(y)}
        size |= {"hh": abs(h).T @ abs(h), "yh": abs(y).T @ abs(h)}
        for name, value in want.items():
            assert np.all(np.abs(getattr(layer, name) - value) <= 1e-12 * size[name]), (index, name)


SPANNED = ("attention", "span")


@pytest.fixture(scope="module")
def spanned(model: Any, tokens: np.ndarray) -> Moments:
    return collect_moments(model, tokens, parts=SPANNED)


def test_moments_of_spans_are_those_of_the_streams_around_them(
    model: Any, tokens: np.ndarray, whole: Moments, spanned: Moments
) -> None:
    spans = spans_of(range(BLOCKS))
    assert list(spanned.layers) == sorted([*range(BLOCKS), *spans])
    ends: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(lambda _m, _a, after, i=i: ends.update({i: after}))
        for i, block in enumerate(model.model.layers)
    ]
    with torch.inference_mode():
        ids = torch.from_numpy(tokens.astype(np.int64))
        states = model.model(ids, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    for span in spans:
        before, after = (t.reshape(-1, 32).double().numpy() for t in (states[span.layer], ends[span.last]))
        found, y = spanned.layers[span], after - before
        scale = np.abs(y).T @ np.abs(before)
        assert np.all(np.abs(found.yh - y.T @ before) <= 1e-4 * scale.max()), span
        np.testing.assert_allclose(found.y, y.sum(0), rtol=1e-3, atol=1e-3 * np.abs(y).sum(0).max())
        # What it reads is what the attention of its first layer reads, which is counted as it was.
        for name in ("n", "x", "h", "xx", "hh"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole.layers[span.layer], name))
    for index in range(BLOCKS):
        np.testing.assert_array_equal(spanned.layers[index].yx, whole.layers[index].yx)


def test_memory_does_not_grow_with_the_text(
    model: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: weakref.WeakSet[Accumulator] = weakref.WeakSet()
    sizes: list[tuple[int, int]] = []

    class Counted(Accumulator):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            alive.add(self)

        def result(self) -> Any:
            assert set(vars(self)) == {"n", "sums"}
            sizes.append((self.n, sum(t.numel() for t in self.sums.values())))
            assert len(alive) == 1, "the sums of one layer at a time"
            return super().result()

    monkeypatch.setattr("nbl_export.calibrate.collect.Accumulator", Counted)
    for rows in (2, ROWS):
        sizes.clear()
        collect_moments(model, tokens[:rows])
        assert sizes == [(rows * LENGTH, 5 * 32 * 32 + 3 * 32)] * BLOCKS


# interruptions -----------------------------------------------------------------------------------


class Place:
    """A folder that moments are collected in, as a calibration does it, with so much memory for states."""

    def __init__(self, folder: Path, every_seconds: float | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.moments, self.partial = folder / "moments", folder / "partial"
        self.states = self.partial / "states.safetensors"
        self.every_seconds = every_seconds

    def collect(
        self,
        model: Any,
        tokens: np.ndarray,
        listener: Any = None,
        fingerprint: str = FINGERPRINT,
        memory: int | None = None,
    ) -> Moments:
        store = MomentsFolder(self.moments, self.partial, {"model": "of a test"}, self.every_seconds)
        store_moments(model, tokens, fingerprint, store, listener, memory=memory)
        files = store.publish()
        assert sorted(self.moments.iterdir()) == sorted(files) and not self.partial.exists()
        return load_moments(self.moments)[0]

    @property
    def files(self) -> int:
        return len(list((self.partial / "states").glob("*.bin")))

    def at(self) -> tuple[int, int]:
        """The block and the number of batches of the checkpoint."""
        with safe_open(self.states, "numpy") as file:
            about = json.loads(json.loads(file.metadata()["nbl_export"])["nbl"])
        return about["part"], about["batch"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_batch_and_the_next_run_goes_on(
    model: Any, tokens: np.ndarray, whole: Moments, batches: int, place: Place, signum: int
) -> None:
    first = Recorder(2, send(signum))
    with pytest.raises(KeyboardInterrupt):
        place.collect(model, tokens, first)
    assert len(first.advanced) == 2 and place.at() == (0, 2)
    second = Recorder()
    assert_same(place.collect(model, tokens, second), whole)
    rows = sum(first.advanced) // LENGTH
    assert second.notes == [f"Calibration goes on from a checkpoint in block 0, at row {rows}."]
    assert second.start == (BLOCKS * ROWS * LENGTH, sum(first.advanced))
    assert len(second.advanced) == batches - 2


def test_a_crash_without_a_checkpoint_keeps_the_layers_that_are_finished(
    model: Any, tokens: np.ndarray, whole: Moments, batches: int, tmp_path: Path
) -> None:
    place = Place(tmp_path, every_seconds=3600.0)
    with pytest.raises(RuntimeError):
        place.collect(model, tokens, Recorder(batches - 1, crash))
    assert not place.states.exists()
    kept = sorted(place.partial.iterdir())
    assert [path.name for path in kept] == ["000.safetensors", "001.safetensors", "002.safetensors"]
    before = [path.stat().st_mtime_ns for path in kept]
    kept[1].write_bytes(kept[1].read_bytes()[:-9])
    moved: list[list[int]] = []
    publish = MomentsFolder.publish

    def watched(store: MomentsFolder) -> list[Path]:
        moved.append([path.stat().st_mtime_ns for path in kept])
        return publish(store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MomentsFolder, "publish", watched)
        assert_same(place.collect(model, tokens), whole)
    assert [old == new for old, new in zip(before, moved[0], strict=True)] == [True, False, True]


@pytest.fixture
def interrupted(model: Any, tokens: np.ndarray, batches: int, tmp_path: Path) -> Place:
    """Stopped in the third block."""
    place = Place(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        place.collect(model, tokens, Recorder(batches // 2 + 2, send(signal.SIGINT)))
    assert place.at() == (2, 2)
    return place


def begun_anew(model: Any, tokens: np.ndarray, place: Place, fingerprint: str = FINGERPRINT) -> Moments:
    """The moments of a run that finds what is left of something else, and takes nothing from it."""
    listener = Recorder()
    moments = place.collect(model, tokens, listener, fingerprint)
    assert listener.start == (BLOCKS * ROWS * LENGTH, 0) and listener.notes == []
    return moments


def test_what_is_left_of_other_tokens_is_ignored(model: Any, tokens: np.ndarray, interrupted: Place) -> None:
    other = tokens.copy()
    other[-1, -1] = (other[-1, -1] + 1) % 256
    assert_same(begun_anew(model, other, interrupted), collect_moments(model, other))


def test_a_damaged_checkpoint_is_ignored_with_a_note(
    model: Any, tokens: np.ndarray, whole: Moments, interrupted: Place
) -> None:
    raw = interrupted.states.read_bytes()
    interrupted.states.write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    listener = Recorder()
    assert_same(interrupted.collect(model, tokens, listener), whole)
    assert listener.notes == ["The checkpoint states.safetensors is damaged and was ignored."]


def test_a_checkpoint_is_ignored_where_an_earlier_layer_is_gone(
    model: Any, tokens: np.ndarray, whole: Moments, interrupted: Place
) -> None:
    (interrupted.partial / "001.safetensors").unlink()
    assert_same(begun_anew(model, tokens, interrupted), whole)


# broken models -----------------------------------------------------------------------------------


def test_the_batch_where_it_broke_is_named_and_nothing_is_saved_of_it(
    tiny_folder: Path, tokens: np.ndarray, tmp_path: Path
) -> None:
    model: Any = load_model(find_model(str(tiny_folder)))
    model.model.embed_tokens.weight[259] = float("nan")  # a token that only one row has
    broken = tokens.copy()
    broken[17, 40] = 259
    place = Place(tmp_path, every_seconds=0.0)
    with pytest.raises(CalibrationError) as caught:
        place.collect(model, broken)
    row = re.search(r"layer 0 .* calibration row (\d+),", str(caught.value))
    assert row
    block, batch = place.at()
    assert block == 0 and 0 < batch * 1024 // LENGTH == int(row[1]) <= 17
    with safe_open(place.states, "numpy") as file:
        assert all(np.isfinite(file.get_tensor(name)).all() for name in file.keys())  # noqa: SIM118


# with little memory -------------------------------------------------------------------------------


BATCHES = 4
BATCH = 8 * LENGTH * 32 * 4  # bytes of the states of one batch
SMALL, LARGE = BATCH, 1 << 30


def test_states_in_files_give_the_same_moments(model: Any, tokens: np.ndarray, tmp_path: Path) -> None:
    ours = in_precision(model, "bfloat16")
    place, seen = Place(tmp_path), []
    place.collect(ours, tokens, Recorder(BATCHES + 2, lambda: seen.append(place.files)), memory=SMALL)
    assert seen == [BATCHES + 2], "the first block's side, and two batches of the other"
    assert_same(load_moments(place.moments)[0], collect_moments(ours, tokens))


@pytest.mark.parametrize("stop", ["interrupt", "crash"])
def test_it_goes_on_after_a_stop_at_any_batch(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path, stop: str
) -> None:
    for at in range(1, BATCHES * BLOCKS + 1):
        place, last = Place(tmp_path / str(at), 1e9), Recorder()
        how = send(signal.SIGINT) if stop == "interrupt" else crash
        with pytest.raises(KeyboardInterrupt if stop == "interrupt" else RuntimeError):
            place.collect(model, tokens, Recorder(at, how), memory=SMALL)
        assert_same(place.collect(model, tokens, last, memory=SMALL), whole)
        # A crash costs the batches of its block: there is a checkpoint at the beginning of each but the first.
        done = at if stop == "interrupt" else (at - 1) // BATCHES * BATCHES
        assert len(last.advanced) == BATCHES * BLOCKS - done, at
        assert last.notes == [] if not done else "goes on from a checkpoint" in last.notes[0]


@pytest.mark.parametrize(("before", "after"), [(SMALL, LARGE), (LARGE, SMALL)])
def test_it_goes_on_with_another_amount_of_memory(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path, before: int, after: int
) -> None:
    place, last, at = Place(tmp_path, 1e9), Recorder(), 6
    with pytest.raises(KeyboardInterrupt):
        place.collect(model, tokens, Recorder(at, send(signal.SIGINT)), memory=before)
    assert (place.files > 0) == (before == SMALL)
    assert_same(place.collect(model, tokens, last, memory=after), whole)
    assert len(last.advanced) == BATCHES * BLOCKS - at


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_the_room_that_is_asked_for_before_the_work_is_enough(
    model: Any, tokens: np.ndarray, tmp_path: Path, memory: int
) -> None:
    used: list[int] = []

    class Looking(Recorder):
        def advance(self, amount: int) -> None:
            super().advance(amount)
            used.append(sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()))

    Place(tmp_path, 0.0).collect(model, tokens, Looking(), memory=memory)
    text = CalibrateSettings(samples=ROWS, seq_len=LENGTH, heldout_samples=1, selection_samples=1)
    room = disk_to_calibrate(sizes_of(model), text)
    headers = 32 * 1024  # of the files, which the formula does not count
    assert 3 * BATCH < max(used) <= room.leaves + room.beside + headers


# several processes --------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("first", "then"), [(3, 2)])
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
