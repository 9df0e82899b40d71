"""Calibration whose states are in files, since they may not take so much memory: the same bits, also after a stop."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate.collect import collect_moments, store_moments
from nbl_export.calibrate.moments import Moments, load_moments
from nbl_export.calibrate.store import MomentsFolder
from nbl_export.models.load import in_precision
from nbl_export.settings import CalibrateSettings
from nbl_export.stages.needs import disk_to_calibrate, sizes_of
from tests.calibrate.conftest import BLOCKS, LENGTH, ROWS
from tests.calibrate.test_collect import assert_same
from tests.interruptions import Recorder, crash, send

BATCHES = 4
BATCH = 8 * LENGTH * 32 * 4  # bytes of the states of one batch
SMALL, LARGE = BATCH, 1 << 30


class Place:
    """A folder that moments are collected in, with so much memory for states."""

    def __init__(self, folder: Path) -> None:
        self.moments, self.partial = folder / "moments", folder / "partial"
        self.every = 1e9  # seconds
        folder.mkdir(exist_ok=True)

    def collect(self, model: Any, tokens: Any, memory: int = SMALL, listener: Any = None) -> Moments:
        store = MomentsFolder(self.moments, self.partial, {"model": "of a test"}, self.every)
        store_moments(model, tokens, "f" * 64, store, listener, memory=memory)
        store.publish()
        assert not self.partial.exists()
        return load_moments(self.moments)[0]

    @property
    def files(self) -> int:
        return len(list((self.partial / "states").glob("*.bin")))


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_states_in_files_give_the_same_moments(
    model: Any, tokens: np.ndarray, tmp_path: Path, dtype: str
) -> None:
    ours = in_precision(model, dtype)
    place, seen = Place(tmp_path), []
    place.collect(ours, tokens, SMALL, Recorder(BATCHES + 2, lambda: seen.append(place.files)))
    assert seen == [BATCHES + 2], "the first block's side, and two batches of the other"
    assert_same(load_moments(place.moments)[0], collect_moments(ours, tokens))


@pytest.mark.parametrize("stop", ["interrupt", "crash"])
def test_it_goes_on_after_a_stop_at_any_batch(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path, stop: str
) -> None:
    for at in range(1, BATCHES * BLOCKS + 1):
        place, last = Place(tmp_path / str(at)), Recorder()
        how = send(signal.SIGINT) if stop == "interrupt" else crash
        with pytest.raises(KeyboardInterrupt if stop == "interrupt" else RuntimeError):
            place.collect(model, tokens, listener=Recorder(at, how))
        assert_same(place.collect(model, tokens, listener=last), whole)
        # A crash costs the batches of its block: there is a checkpoint at the beginning of each but the first.
        done = at if stop == "interrupt" else (at - 1) // BATCHES * BATCHES
        assert len(last.advanced) == BATCHES * BLOCKS - done, at
        assert last.notes == [] if not done else "goes on from a checkpoint" in last.notes[0]


@pytest.mark.parametrize(("before", "after"), [(SMALL, LARGE), (LARGE, SMALL)])
@pytest.mark.parametrize("at", [6])
def test_it_goes_on_with_another_amount_of_memory(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path, before: int, after: int, at: int
) -> None:
    place, last = Place(tmp_path), Recorder()
    with pytest.raises(KeyboardInterrupt):
        place.collect(model, tokens, before, Recorder(at, send(signal.SIGINT)))
    assert (place.files > 0) == (before == SMALL)
    assert_same(place.collect(model, tokens, after, last), whole)
    assert len(last.advanced) == BATCHES * BLOCKS - at


def test_a_damaged_file_of_states_begins_anew_with_a_note(
    model: Any, tokens: np.ndarray, whole: Moments, tmp_path: Path
) -> None:
    place, last = Place(tmp_path), Recorder()
    with pytest.raises(KeyboardInterrupt):
        place.collect(model, tokens, listener=Recorder(6, send(signal.SIGINT)))
    path = place.partial / "states" / "1.3.bin"
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    assert_same(place.collect(model, tokens, listener=last), whole)
    assert last.notes == ["The checkpoint states.safetensors is damaged and was ignored."]


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_the_room_that_is_asked_for_before_the_work_is_enough(
    model: Any, tokens: np.ndarray, tmp_path: Path, memory: int
) -> None:
    place, most = Place(tmp_path), [0]

    def look() -> None:
        used = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
        most[0] = max(most[0], used)

    class Looking(Recorder):
        def advance(self, amount: int) -> None:
            super().advance(amount)
            look()

    place.every = 0.0
    place.collect(model, tokens, memory, Looking())
    text = CalibrateSettings(samples=ROWS, seq_len=LENGTH, heldout_samples=1, selection_samples=1)
    room = disk_to_calibrate(sizes_of(model), text)
    headers = 32 * 1024  # of the files, which the formula does not count
    assert 3 * BATCH < most[0] <= room.leaves + room.beside + headers
