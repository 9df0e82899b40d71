"""Room for candidates beside each other, by peaks that are made up and by those of real processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.child_process import Tell
from nbl_export.errors import InputError
from nbl_export.verify.speed import memory as module
from nbl_export.verify.speed.candidates import Candidate
from nbl_export.verify.speed.memory import NO_ROOM, Memory, measure_memory, peak_bytes
from nbl_export.verify.speed.values import CellResult
from tests.listening import Notes
from tests.verify.speed.raced import ran

GIB = 1 << 30


@pytest.mark.usefixtures("told")
def test_who_does_not_fit_beside_the_others_is_left_out() -> None:
    gib = 1 << 30
    peaks = {
        "base": {(1, 8): gib, (1, 16): 3 * gib},
        "linearized": {(1, 8): gib, (1, 16): 3 * gib},
        "other": {(1, 8): gib, (1, 16): "it finds no room"},
    }

    def prefills(*free: int) -> list[CellResult]:
        left = iter(free)
        found = ran([(1, 8), (1, 16)], memory=Memory(peaks, lambda: next(left)))
        return [cell for cell in found if cell.phase == "prefill"]

    # What the small cell took need not be there again.
    small, large = prefills(4 * gib, 4 * gib), prefills(40 * gib, 40 * gib)
    assert [[r.name for r in cell.results] for cell in small] == [["base", "linearized", "other"], ["base"]]
    assert small[1].absent == {
        "linearized": "does not fit into memory with the others: it needs 3.0 GiB",
        "other": "it finds no room",
    }
    assert [[r.name for r in cell.results] for cell in large][1] == ["base", "linearized"]
    assert large[1].results[0].peak_bytes == 3 * gib


def nobody(*_: Any) -> Any:
    raise AssertionError("made")


ONE, TWO, TORCH = (Candidate(name, nobody) for name in ("one", "two", "torch"))
CELL = (1, 8)


def fitting(memory: Memory, *candidates: Candidate) -> tuple[list[str], dict[str, str]]:
    absent: dict[str, str] = {}
    return [c.name for c in memory.fitting(candidates, CELL, {}, absent)], absent


@pytest.mark.parametrize(
    ("free", "names"), [(3.4, ["one", "two"]), (3.3, ["one"]), (1.2, ["one"]), (1.1, [])], ids=str
)
def test_a_tenth_of_what_is_free_is_left(free: float, names: list[str]) -> None:
    """One GiB and two: nine tenths of 3.4 GiB hold both, of 3.3 the first; of 1.2 the first, of 1.1 none."""
    peaks = {"one": {CELL: GIB}, "two": {CELL: 2 * GIB}}
    found, absent = fitting(Memory(peaks, lambda: int(free * GIB)), ONE, TWO)
    assert found == names and set(absent) == {"one", "two"} - set(names)
    if "two" in absent:
        assert absent["two"] == "does not fit into memory with the others: it needs 2.0 GiB"


def test_each_graph_is_measured_once_for_all_who_run_it(stories_out: Path) -> None:
    graph = stories_out / "model.onnx"
    candidates = [Candidate(name, nobody, graph=graph) for name in ("linearized", "again")]
    notes = Notes()
    memory = measure_memory([*candidates, TORCH], [(2, 16), (1, 8)], listener=notes)
    assert notes.tasks == [("Measuring peak memory", 1, "graphs", 0)] and notes.advanced == [1]
    assert set(memory.peaks) == {"linearized", "again"}
    assert memory.peaks["again"] == memory.peaks["linearized"]
    # Cells ascend: in another order the small one's peak would be the large one's.
    assert list(memory.peaks["again"]) == [(1, 8), (2, 16)]
    small, large = memory.peaks["again"].values()
    assert isinstance(small, int) and isinstance(large, int) and 0 < small <= large


# processes ---------------------------------------------------------------------------------------


def test_peaks_are_those_of_processes_of_their_own(stories_out: Path) -> None:
    cells = [(1, 8), (2, 400)]
    held = np.ones(1 << 27)  # 1 GiB
    found = peak_bytes(stories_out / "model.onnx", cells)
    del held
    small, large = (found[cell] for cell in cells)
    assert isinstance(small, int) and isinstance(large, int)
    # Not of this process, which a process that it starts begins as.
    assert (20 << 20) < small <= large < (1 << 30)
    # What does not run is no want of memory.
    found = peak_bytes(stories_out / "model.onnx", [(1, 8), (-1, 8), (1, 16)])
    assert list(map(type, found.values())) == [int, str, str] and "negative" in str(found[1, 16])
    with pytest.raises(InputError, match=r"no-such.onnx does not exist"):
        peak_bytes(stories_out / "no-such.onnx", cells)


def test_what_finds_no_room_says_so_and_so_does_what_is_larger(stories_out: Path) -> None:
    """A mask of a million tokens squared is more than a machine has; no process is killed for it."""
    found = peak_bytes(stories_out / "model.onnx", [(1, 8), (1, 1 << 20), (2, 1 << 20)])
    small, *larger = found.values()
    assert isinstance(small, int) and larger == [NO_ROOM, NO_ROOM]


def broken(asked: Any, tell: Tell) -> None:
    """In the place of the measuring function: the first cell, and then what the test asks for."""
    tell(1 << 20)
    if asked[0].endswith("raises.onnx"):
        raise TypeError("of the runtime")
    os.kill(os.getpid(), getattr(signal, Path(asked[0]).stem))


@pytest.mark.parametrize(
    ("end", "said"),
    [("SIGKILL", NO_ROOM), ("SIGABRT", NO_ROOM), ("SIGSEGV", "died by SIGSEGV")],
)
def test_what_was_measured_before_the_end_is_kept(
    monkeypatch: pytest.MonkeyPatch, end: str, said: str
) -> None:
    monkeypatch.setattr(module, "measure", broken)
    found = peak_bytes(Path(f"{end}.onnx"), [(1, 8), (1, 16), (2, 8)])
    assert found[1, 8] == 1 << 20
    assert all(str(found[cell]).startswith(said) for cell in ((1, 16), (2, 8)))
