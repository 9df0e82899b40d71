"""Calibration sums what the model computes; no stop, no lack of memory and no number of processes changes it."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.blocks import spans_of
from nbl_export.calibrate.collect import collect_moments, identity_of, moments_of
from nbl_export.calibrate.moments import ARRAYS, Accumulator, Moments, MomentsFolder, load_moments
from nbl_export.errors import CalibrationError
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.ranks import ALONE, LostRankError, Ranks
from nbl_export.settings import CalibrateSettings, RunSettings
from nbl_export.stages.needs import disk, sizes_of
from tests.calibrate.conftest import BLOCKS, LENGTH, ROWS
from tests.processes import Recorder, crash, forked, send
from tests.tiny_types import activations

FINGERPRINT = "f" * 64


def assert_same(found: Moments, want: Moments, within: float = 0.0) -> None:
    """The same layers, counts and sums, ``within`` a part of the size of each."""
    assert set(found.layers) == set(want.layers)
    for index, layer in want.layers.items():
        assert found.layers[index].n == layer.n
        for name in ARRAYS:
            value = getattr(layer, name)
            gap = np.linalg.norm(getattr(found.layers[index], name) - value)
            assert gap <= within * np.linalg.norm(value), (index, name)


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


def test_moments_of_spans_are_those_of_the_streams_around_them(
    model: Any, tokens: np.ndarray, whole: Moments
) -> None:
    spans, spanned = spans_of(range(BLOCKS)), collect_moments(model, tokens, parts=("attention", "span"))
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
    sizes: list[tuple[int, int]] = []

    class Counted(Accumulator):
        def moments(self, block: Any, n: int, sums: Any) -> Any:
            assert not self.sums, "the sums of one layer at a time"
            sizes.append((n, sum(t.numel() for t in sums.values())))
            return super().moments(block, n, sums)

    for rows in (2, ROWS):
        sizes.clear()
        for _ in moments_of(model, tokens[:rows], accumulator=Counted):
            pass
        assert sizes == [(rows * LENGTH, 5 * 32 * 32 + 3 * 32)] * BLOCKS


# interruptions -----------------------------------------------------------------------------------


class Place:
    """A folder that moments are collected in, as a calibration does it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.moments, self.partial = folder / "moments", folder / "partial"

    def collect(
        self, model: Any, tokens: np.ndarray, listener: Any = None, ranks: Ranks = ALONE, **how: Any
    ) -> Moments:
        identity = identity_of(model, tokens, FINGERPRINT)
        store = MomentsFolder(self.moments, self.partial, {"identity": identity})
        for block, layer in moments_of(
            model,
            tokens,
            listener=listener,
            known=store.has,
            folder=self.partial,
            identity=identity,
            ranks=ranks,
            **how,
        ):
            store.put(block, layer)
        if not ranks.first:
            return Moments({})
        files = store.publish()
        assert sorted(self.moments.iterdir()) == sorted(files) and not self.partial.exists()
        return load_moments(self.moments)[0]

    def states(self) -> list[str]:
        return sorted(path.name for path in self.partial.glob("states.*"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_batch_and_the_next_run_goes_on_at_the_block(
    model: Any, tokens: np.ndarray, whole: Moments, place: Place, signum: int
) -> None:
    first = Recorder(BATCHES + 2, send(signum))
    with pytest.raises(KeyboardInterrupt):
        place.collect(model, tokens, first)
    assert len(first.advanced) == BATCHES + 2 and place.states() == ["states.001.0-of-1.safetensors"]
    second = Recorder()
    assert_same(place.collect(model, tokens, second), whole)
    assert second.notes == ["Calibration goes on at block 1, from the states before it."]
    assert second.start == (BLOCKS * ROWS * LENGTH, ROWS * LENGTH)
    assert len(second.advanced) == BATCHES * BLOCKS - BATCHES
    assert second.advanced[-1] < second.advanced[0]


@pytest.mark.parametrize("what", ["other tokens", "damage", "a layer that is gone"])
def test_it_begins_anew_after(
    model: Any, tokens: np.ndarray, whole: Moments, place: Place, what: str
) -> None:
    """What is left of a run that was stopped in the third block is not taken."""
    with pytest.raises(KeyboardInterrupt):
        place.collect(model, tokens, Recorder(2 * BATCHES + 2, send(signal.SIGINT)))
    (states,) = place.states()
    if what == "other tokens":
        tokens = tokens.copy()
        tokens[-1, -1] = (tokens[-1, -1] + 1) % 256
        whole = collect_moments(model, tokens)
    elif what == "damage":
        raw = (place.partial / states).read_bytes()
        (place.partial / states).write_bytes(raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:])
    else:
        (place.partial / "001.safetensors").unlink()
    listener = Recorder()
    assert_same(place.collect(model, tokens, listener), whole)
    assert listener.start == (BLOCKS * ROWS * LENGTH, 0) and listener.notes == []


def test_the_batch_where_it_broke_is_named(tiny_folder: Path, tokens: np.ndarray, place: Place) -> None:
    model: Any = load_model(find_model(str(tiny_folder)))
    model.model.embed_tokens.weight[259] = float("nan")  # a token that only one row has
    broken = tokens.copy()
    broken[17, 40] = 259
    with pytest.raises(CalibrationError) as caught:
        place.collect(model, broken)
    row = re.search(r"layer 0 .* calibration row (\d+),", str(caught.value))
    assert row and int(row[1]) == 17 // (1024 // LENGTH) * (1024 // LENGTH)


# with little memory -------------------------------------------------------------------------------


BATCHES = 4
BATCH = 8 * LENGTH * 32 * 4  # bytes of the states of one batch
SMALL, LARGE = BATCH, 1 << 30


@pytest.mark.parametrize(("before", "after"), [(SMALL, SMALL), (SMALL, LARGE), (LARGE, SMALL)])
@pytest.mark.parametrize("stop", ["interrupt", "crash"])
def test_it_goes_on_after_a_stop_at_any_batch_with_any_memory(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path, stop: str, before: int, after: int
) -> None:
    for at in range(1, BATCHES * BLOCKS + 1, 3):
        place, last = Place(tmp_path / str(at)), Recorder()
        how = send(signal.SIGINT) if stop == "interrupt" else crash
        with pytest.raises(KeyboardInterrupt if stop == "interrupt" else RuntimeError):
            place.collect(model, tokens, Recorder(at, how), memory=before, every_seconds=0.0)
        assert_same(place.collect(model, tokens, last, memory=after), whole)
        assert len(last.advanced) == BATCHES * BLOCKS - (at - 1) // BATCHES * BATCHES, "its block again"


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_the_room_that_is_asked_for_before_the_work_is_enough(
    model: Any, tokens: np.ndarray, tmp_path: Path, memory: int
) -> None:
    used: list[int] = []

    class Looking(Recorder):
        def advance(self, amount: int) -> None:
            super().advance(amount)
            used.append(sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()))

    Place(tmp_path).collect(model, tokens, Looking(), memory=memory, every_seconds=0.0)
    text = CalibrateSettings(samples=ROWS, seq_len=LENGTH, heldout_samples=1, selection_samples=1)
    room = disk(sizes_of(model), RunSettings.of(calibration=text))["calibrate"]
    headers = 32 * 1024  # of the files, which the formula does not count
    assert 3 * BATCH < max(used) <= sum(room) + headers


# several processes --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 6])  # of six, two have no batch
def test_several_processes_give_the_moments_of_one(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path, count: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def work(ranks: Ranks) -> Any:
        listener = Recorder()
        Place(out).collect(model, tokens, listener, ranks)
        return listener.start, sum(listener.advanced)

    told = forked(count, tmp_path / "results", work)
    assert_same(load_moments(out / "moments")[0], whole, 1e-12)
    assert sorted(path.name for path in out.iterdir()) == ["moments"]
    # The first counts the tokens of all.
    assert told[0] == ((BLOCKS * ROWS * LENGTH, 0), BLOCKS * ROWS * LENGTH)


def test_a_run_goes_on_from_the_states_of_any_number_of_processes(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()

    def crashing(ranks: Ranks) -> Any:  # in the third block
        at = 2 * -(-BATCHES // ranks.count) + 1
        Place(out).collect(model, tokens, Recorder(at, crash), ranks, every_seconds=0.0)

    for error in forked(3, tmp_path / "crashed", crashing):
        assert isinstance(error, (RuntimeError, LostRankError))
    states = [f"states.002.{rank}-of-3.safetensors" for rank in range(3)]
    assert sorted(path.name for path in (out / "partial").glob("states*")) == states

    def going_on(ranks: Ranks) -> Any:
        runs: list[int] = []
        model.model.layers[1].register_forward_hook(lambda *_: runs.append(1))
        listener = Recorder()
        Place(out).collect(model, tokens, listener, ranks)
        return runs, listener.start, listener.notes

    for runs, start, notes in forked(2, tmp_path / "gone_on", going_on):
        assert runs == []  # no batch passes the second block again
        assert start == (BLOCKS * ROWS * LENGTH, 2 * ROWS * LENGTH)
        assert notes == ["Calibration goes on at block 2, from the states before it."]
    assert_same(load_moments(out / "moments")[0], whole, 1e-12)
    assert sorted(path.name for path in out.iterdir()) == ["moments"]
