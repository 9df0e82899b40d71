"""Peak memory of a graph, cell by cell, each graph in a process of its own.

For each batch and context it is the resident bytes at their highest, the process's Python and runtime included, or the
reason why the graph did not run. Cells are run in the order given, which must ascend: a runtime keeps the memory that
it once took.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbl_export.child_process import OUT_OF_MEMORY, ChildError, Tell, in_child

NO_ROOM = "out of memory"
# What the runtime, numpy and C++ say of it.
_ALLOCATION = ("allocate", "bad_alloc")


def peak_bytes(
    path: Path, cells: Sequence[tuple[int, int]], positions: int | None = None
) -> dict[tuple[int, int], int | str]:
    """Peaks of the graph at ``path`` in each of ``cells`` (batch, context), or why it has none there.

    ``positions`` are those of the model: after the last of them there is no token to decode. Raises
    :class:`ChildError` if the process cannot do its work for another reason.
    """
    found: dict[tuple[int, int], int | str] = {}

    def heard(value: int | str) -> None:
        found[cells[len(found)]] = value

    asked = [str(path.resolve()), [list(cell) for cell in cells], positions]
    what, remedy = f"Measuring the peak memory of {path}", "leave it out with --no-memory"
    missing = NO_ROOM
    try:
        in_child(measure, asked, what, remedy, heard=heard)
    except ChildError as error:
        if error.signal is None and error.reason != OUT_OF_MEMORY:
            raise
        # A process that is killed wanted more than there is, as C++ does that aborts; a crash may have other reasons.
        if error.signal not in (None, signal.SIGKILL, signal.SIGABRT):
            missing = error.reason
    return {cell: found.get(cell, missing) for cell in cells}


def measure(asked: Any, tell: Tell) -> None:
    """In the child: tell the peak after each cell, or why there is none."""
    from nbl_export.verify.speed.candidates import OrtGraph
    from nbl_export.verify.speed.race import reason_of

    path, cells, positions = asked
    graph = OrtGraph(Path(path))
    assert graph.model  # a graph that does not load is not one without room
    for index, (batch, context) in enumerate(cells):
        try:
            prompt = graph(context, batch)
            prompt.prefill()
            if context != positions:
                prompt.step()
        except Exception as error:  # the runtime's own kind of out-of-memory, or what it does not run
            reason = reason_of(error)
            if any(word in reason for word in _ALLOCATION):
                reason = NO_ROOM
            for _ in cells[index:]:
                tell(reason)
            return
        tell(_highest())
        del prompt


def _highest() -> int:
    """The process's highest resident bytes so far."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # what the process that started this one took would count in the maximum of getrusage
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return peak_in_bytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, sys.platform)


def peak_in_bytes(maxrss: int, platform: str) -> int:
    """``ru_maxrss`` in bytes: it is in KiB everywhere but on macOS."""
    return maxrss if platform == "darwin" else maxrss * 1024
