"""Several processes that work together: forked ones that do what a test says, and commands that torchrun starts."""

from __future__ import annotations

import os
import pickle
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbl_export.ranks import Ranks, together
from tests.command_line import ENVIRONMENT, Done
from tests.listening import leave_what_was_there


def forked(count: int, folder: Path, work: Callable[[Ranks], Any]) -> list[Any]:
    """What ``work`` gives, or the error that it raises, in each of ``count`` connected processes."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_child(rank, count, port, folder / str(rank), work) for rank in range(count)]
    for child in children:
        os.waitpid(child, 0)
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(count)]


def _child(rank: int, count: int, port: int, to: Path, work: Callable[[Ranks], Any]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    leave_what_was_there()
    try:
        place = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})
        with together() as ranks:
            try:
                found = work(ranks)
            except Exception as error:
                found = error
            to.write_bytes(pickle.dumps(found))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def torchrun(count: int, *arguments: object, script: Path | None = None, **environment: str) -> Done:
    """`nbl-export ARGUMENTS` by torchrun in ``count`` processes; a ``script`` stands for nbl-export.

    ``err`` is without what torchrun itself says when a process failed.
    """
    program = [str(script)] if script else ["-m", "nbl_export"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)),
            *(*program, *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "OMP_NUM_THREADS": "1", **environment},
        timeout=300,
    )
    said, _, report = done.stderr.partition("Traceback (most recent call last)")
    assert "nbl_export" not in report.replace("nbl_export FAILED", ""), done.stderr  # no traceback of our own
    own = [line for line in said.splitlines() if not re.match(r"[EW]\d{4} ", line)]
    return Done(done.returncode, done.stdout, "\n".join(own))
