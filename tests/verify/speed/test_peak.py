"""Peak memory of a graph in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nbl_export.errors import BuildError
from nbl_export.verify.speed.peak import NO_ROOM, peak_bytes


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
    with pytest.raises(BuildError, match=r"no-such.onnx cannot be measured \(.*does not exist"):
        peak_bytes(stories_out / "no-such.onnx", cells)


def test_what_finds_no_room_says_so_and_so_does_what_is_larger(stories_out: Path) -> None:
    """A mask of a million tokens squared is more than a machine has; no process is killed for it."""
    found = peak_bytes(stories_out / "model.onnx", [(1, 8), (1, 1 << 20), (2, 1 << 20)])
    small, *larger = found.values()
    assert isinstance(small, int) and larger == [NO_ROOM, NO_ROOM]
