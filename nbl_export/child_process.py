"""Run a piece of work in a child process: what kills or hangs it there costs a sentence, not the run.

1. What the work is asked, tells and returns is pickled between our own two processes; large results go by file.
2. What a library prints goes to a file whose last line says why the child died. NBL_EXPORT_DEBUG shows it instead.
3. An :class:`NblError` or an ``OSError`` of the work is raised in the parent. Anything else that ends the child, and
   too long a silence, is a :class:`ChildError`.
4. The child does not outlive :func:`in_child`, whatever that raises, nor, on Linux, a parent that is killed.
5. The child imports from where the parent does, and from no other folder.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from nbl_export.errors import BuildError, NblError, first_line

Tell = Callable[[Any], None]
Work = Callable[[Any, Tell], Any]

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from nbl_export.child_process import main; main()"
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
