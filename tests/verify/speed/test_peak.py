"""Peak memory of a graph in a process of its own."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.child_process import Tell
from nbl_export.errors import BuildError, InputError
from nbl_export.verify.speed import peak as module
from nbl_export.verify.speed.peak import NO_ROOM, peak_bytes, peak_in_bytes


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


def test_another_failure_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure", broken)
    with pytest.raises(BuildError) as caught:
        peak_bytes(Path("raises.onnx"), [(1, 8)])
    assert str(caught.value) == (
        "Measuring the peak memory of raises.onnx failed (TypeError: of the runtime): leave it out with --no-memory."
    )


def test_macos_counts_bytes() -> None:
    assert peak_in_bytes(5 << 20, "darwin") == peak_in_bytes(5 << 10, "linux") == 5 << 20
