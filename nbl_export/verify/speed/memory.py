"""Measure the peak memory of graphs, each in a process of its own, and tell which candidates fit beside each other.

The peak of a cell is the resident bytes at their highest, the process's Python and runtime included, or the reason why
the graph did not run. Cells are run in ascending order: a runtime keeps the memory that it once took.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbl_export.child_process import OUT_OF_MEMORY, ChildError, Tell, in_child
from nbl_export.machine import free_memory
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.session import USABLE
from nbl_export.verify.speed.candidates import Candidate, OrtGraph
from nbl_export.verify.speed.values import reason_of

NO_ROOM = "out of memory"
# What the runtime, numpy and C++ say of it.
_ALLOCATION = ("allocate", "bad_alloc")


def ordered(cells: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cells (batch, context) by what attention's scores take in them, each once."""
    return sorted(set(cells), key=lambda cell: (cell[0] * cell[1] ** 2, cell))


@dataclass(frozen=True)
class Memory:
    """Peak bytes of each candidate by (batch, context), or why its process did not run that cell.

    ``free`` says how many bytes there are to be had. Without peaks everything fits.
    """

    peaks: Mapping[str, Mapping[tuple[int, int], int | str]] = field(default_factory=dict)
    free: Callable[[], int] = free_memory

    def peak(self, name: str, cell: tuple[int, int]) -> int | None:
        """The peak bytes of one that runs the cell, as far as they were measured."""
        found = self.peaks.get(name, {}).get(cell)
        return found if isinstance(found, int) else None

    def fitting(
        self,
        candidates: Sequence[Candidate],
        cell: tuple[int, int],
        held: dict[str, int],
        absent: dict[str, str],
    ) -> list[Candidate]:
        """Those that fit beside each other, the first before the last; reasons go into ``absent``.

        ``held`` is what each has taken in earlier cells and keeps; it is told what they take in this one.
        """
        largest = max((self.peak(name, cell) or 0 for name in self.peaks), default=0)
        found, left = [], self.free() * USABLE
        for one in candidates:
            # PyTorch, which has no process of its own, is taken for as large as the largest.
            peak = self.peaks.get(one.name, {}).get(cell, largest)
            if isinstance(peak, str):
                absent[one.name] = peak
                continue
            more = max(0, peak - held.get(one.name, 0))
            if more > left:
                absent[one.name] = (
                    f"does not fit into memory with the others: it needs {peak / 2**30:.1f} GiB"
                )
            else:
                left -= more
                held[one.name] = max(peak, held.get(one.name, 0))
                found.append(one)
        return found


def measure_memory(
    candidates: Sequence[Candidate],
    cells: Sequence[tuple[int, int]],
    positions: int | None = None,
    listener: Listener | None = None,
) -> Memory:
    """Peaks of the candidates' graphs on the CPU, each in a process of its own.

    ``positions`` are those of the model: after the last of them there is no token to decode.
    """
    peaks = {}
    graphs = list(dict.fromkeys(c.graph for c in candidates if c.graph is not None))
    with (listener or Silent()).task("Measuring peak memory", len(graphs), "graphs") as task:
        for graph in graphs:
            found = peak_bytes(graph, ordered(cells), positions)
            peaks.update({c.name: found for c in candidates if c.graph == graph})
            task.advance(1)
    return Memory(peaks)


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
