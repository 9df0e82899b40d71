"""Which candidates find room beside each other: peak memory of each graph, against what the machine has free."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from nbl_export.progress import Listener, Silent
from nbl_export.verify.speed.candidates import Candidate
from nbl_export.verify.speed.peak import peak_bytes

# Of a machine's free memory; the rest is for what nobody counts.
_USABLE = 0.9


def ordered(cells: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cells (batch, context) by what attention's scores take in them, each once."""
    return sorted(set(cells), key=lambda cell: (cell[0] * cell[1] ** 2, cell))


@dataclass(frozen=True)
class Memory:
    """Peak bytes of each candidate by (batch, context), or why its process did not run that cell.

    ``free`` says how many bytes there are to be had. Without peaks everything fits.
    """

    peaks: Mapping[str, Mapping[tuple[int, int], int | str]] = field(default_factory=dict)
    free: Callable[[], int] = lambda: psutil.virtual_memory().available

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
        found, left = [], self.free() * _USABLE
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
