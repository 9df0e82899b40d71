"""Peak memory of a graph, cell by cell, each graph in a process of its own.

    python -m nbl_export.verify.speed.peak GRAPH '[[1, 512], [4, 2048]]' [POSITIONS]

prints one JSON value: for each batch and context the resident bytes at their highest, the process's Python and runtime
included, or the reason why the graph did not run. After the last of POSITIONS there is no token to decode. Cells are
run in the order given, which must ascend: a runtime keeps the memory that it once took.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from nbl_export.errors import BuildError

NO_ROOM = "out of memory"
# What the runtime, numpy and C++ say of it.
_ALLOCATION = ("allocate", "bad_alloc")


def peak_bytes(
    path: Path, cells: Sequence[tuple[int, int]], positions: int | None = None
) -> dict[tuple[int, int], int | str]:
    """Peaks of the graph at ``path`` in each of ``cells`` (batch, context), or why it has none there.

    ``positions`` are those of the model: after the last of them there is no token to decode. Raises
    :class:`BuildError` if the process cannot do its work for another reason.
    """
    command = [
        sys.executable,
        "-m",
        "nbl_export.verify.speed.peak",
        str(path.resolve()),
        json.dumps(list(cells)),
    ]
    command += [] if positions is None else [str(positions)]
    # In an empty folder Python takes no file of the user's for a module.
    with tempfile.TemporaryDirectory(prefix="nbl-peak.") as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode > 0:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BuildError(
            f"The peak memory of {path} cannot be measured ({said}): leave it out with --no-memory."
        )
    # A process that is killed wanted more than there is.
    found = dict(zip(cells, [] if done.returncode else json.loads(done.stdout), strict=False))
    return {cell: found.get(cell, NO_ROOM) for cell in cells}


def _measure(path: Path, cells: Sequence[tuple[int, int]], positions: int | None) -> list[int | str]:
    from nbl_export.verify.speed.candidates import OrtGraph
    from nbl_export.verify.speed.race import reason_of

    # Beyond this an allocation fails, which one can catch; the kernel's way with too little memory is to kill.
    free = psutil.virtual_memory().available
    resource.setrlimit(resource.RLIMIT_DATA, (free, free))
    graph = OrtGraph(path)
    assert graph.model  # a graph that does not load is not one without room
    found: list[int | str] = []
    for batch, context in cells:
        try:
            prompt = graph(context, batch)
            prompt.prefill()
            if context != positions:
                prompt.step()
        except Exception as error:  # the runtime's own kind of out-of-memory, or what it does not run
            reason = reason_of(error)
            if any(word in reason for word in _ALLOCATION):
                reason = NO_ROOM
            found += [reason] * (len(cells) - len(found))
            break
        found.append(_highest())
        del prompt
    return found


def _highest() -> int:
    """The process's highest resident bytes so far."""
    status = Path("/proc/self/status")
    if status.exists():  # what the process that started this one took would count in the maximum of getrusage
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    asked = [tuple(c) for c in json.loads(sys.argv[2])]
    print(json.dumps(_measure(Path(sys.argv[1]), asked, int(sys.argv[3]) if sys.argv[3:] else None)))
