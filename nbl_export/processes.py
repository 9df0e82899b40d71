"""Run work in a child process, and hold interrupts back: what kills or hangs a child costs a sentence, not the run.

1. What the work is asked, tells and returns is pickled between our own two processes; large results go by file.
2. What a library prints goes to a file whose last line says why the child died. NBL_EXPORT_DEBUG shows it instead.
3. An :class:`NblError` or an ``OSError`` of the work is raised in the parent. Anything else that ends the child, and
   too long a silence, is a :class:`ChildError`.
4. The child does not outlive :func:`in_child`, whatever that raises, nor, on Linux, a parent that is killed.
5. The child imports from where the parent does, and from no other folder.
6. An interrupt waits for the end of a step (:func:`deferred_interrupt`), where unfinished work is saved.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from nbl_export.errors import BuildError, Interrupted, NblError, first_line

Tell = Callable[[Any], None]
Work = Callable[[Any, Tell], Any]

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from nbl_export.processes import main; main()"
)
_KEPT = 8192  # bytes of what the child wrote last
_PR_SET_PDEATHSIG = 1  # sys/prctl.h
OUT_OF_MEMORY = "ran out of memory"  # the reason of a child that did
# Loaded here: a process that has just been forked must not load a library, another thread may hold the loader's lock.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class ChildError(BuildError):
    """A child process died, failed or was silent. ``reason`` says how; ``signal`` is the one that ended it."""

    def __init__(self, what: str, reason: str, remedy: str, ended_by: int | None = None) -> None:
        super().__init__(f"{what} {reason}: {remedy}.")
        self.reason, self.signal = reason, ended_by


def in_child(
    function: Work,
    asked: Any,
    what: str,
    remedy: str,
    seconds: float | None = None,
    heard: Tell = lambda value: None,
) -> Any:
    """``function(asked, tell)``, computed in a child process; ``heard`` is called with each value that it tells.

    It is given up after so many ``seconds`` without a word. ``what`` begins the sentence of a :class:`ChildError` and
    ``remedy`` ends it: "Building of X" "died by SIGSEGV" "use another exporter".
    """
    path = json.dumps([entry or str(Path.cwd()) for entry in sys.path])
    here, there = Pipe()
    with here, tempfile.TemporaryFile() as said:
        with there:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, path, str(there.fileno()), str(os.getpid())],  # (5)
                stdin=subprocess.DEVNULL,
                stdout=2 if os.environ.get("NBL_EXPORT_DEBUG") else said,  # (2)
                stderr=2 if os.environ.get("NBL_EXPORT_DEBUG") else said,
                pass_fds=[there.fileno()],
            )
        try:
            here.send((function, asked))
            while here.poll(seconds):
                kind, value = here.recv()
                if kind == "told":
                    heard(value)
                elif kind == "returned":
                    return value
                elif isinstance(value, str):
                    raise ChildError(what, value, remedy)
                else:
                    raise value
            raise ChildError(what, f"made no progress in {seconds:,g} s", remedy)
        except (EOFError, ConnectionError):
            code = process.wait()
            said.seek(max(0, said.seek(0, os.SEEK_END) - _KEPT))
            last = (said.read().decode(errors="replace").strip().splitlines() or [""])[-1].strip()
            raise ChildError(what, death(code, last), remedy, max(0, -code) or None) from None
        finally:  # (4)
            process.kill()
            process.wait()


def death(code: int, last: str = "") -> str:
    """How a process ended that gave no answer, from its exit code and the ``last`` line that it wrote."""
    if code >= 0:
        return f"ended with exit code {code}" + (f" ({last.rstrip('.')[:300]})" if last else "")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"died by {name}" + (", often because memory ran out" if name == "SIGKILL" else "")


def main() -> NoReturn:
    """In the child: do what is asked; the process ends here, without the exit handlers of any library."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    die_with_parent()
    handle, parent = map(int, sys.argv[2:])
    if os.getppid() != parent:
        os._exit(1)
    os.set_inheritable(handle, False)
    answers = Connection(handle)
    try:
        function, asked = answers.recv()
        answers.send(("returned", function(asked, lambda value: answers.send(("told", value)))))
    except ChildError as error:  # of a child of this one
        answers.send(("raised", BuildError(str(error))))
    except (NblError, OSError) as error:
        answers.send(("raised", error))
    except MemoryError:
        answers.send(("raised", OUT_OF_MEMORY))
    except BaseException as error:
        traceback.print_exc()
        answers.send(("raised", f"failed ({type(error).__name__}: {first_line(error)[:300]})"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends; on Linux only."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


# interrupts ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """Where to save unfinished work, and how often."""

    path: Path
    every_seconds: float = 60.0


@contextmanager
def saving_to(checkpoint: Checkpoint | None, save: Callable[[Path], None]) -> Iterator[Callable[[], None]]:
    """Yields a function to call between two steps: it calls ``save`` when a save is due, and after an interrupt.

    The first Ctrl-C (or SIGTERM, or SIGHUP) is deferred until that call, which saves and raises
    :class:`Interrupted`. The second one stops at once; the last checkpoint remains.
    """
    saved_at = time.monotonic()

    def between() -> None:
        nonlocal saved_at
        if checkpoint and (stop or time.monotonic() - saved_at > checkpoint.every_seconds):
            save(checkpoint.path)
            saved_at = time.monotonic()
        if stop:
            raise Interrupted(stop[0])

    with deferred_interrupt() as stop:
        yield between


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGHUP wait; yields the list of the signal that has come, which is empty before.

    The second one raises :class:`Interrupted` at once.
    """
    stop: list[int] = []

    def defer(signum: int) -> None:
        if stop:
            raise Interrupted(signum)
        stop.append(signum)

    with on_signals(defer):
        yield stop


@contextmanager
def on_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Within the block, ``handle`` is called with the number of each SIGINT, SIGTERM and SIGHUP.

    One that is ignored stays so (SIGHUP under nohup, SIGINT of a shell's background job). Python lets only the main
    thread hear signals; elsewhere nothing changes.
    """
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if in_main_thread() else ()
    before = {s: old for s in ending if (old := signal.getsignal(s)) is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, lambda number, _frame: handle(number))
    try:
        yield
    finally:
        for signum, old in before.items():
            # None means that the handler was not set from Python; the default is the closest substitute.
            signal.signal(signum, signal.SIG_DFL if old is None else old)


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
