"""A piece of work in a child process: what kills or hangs it there costs a sentence, not the run.

    parent                                       child
    in_child(function, asked, …)        ──▶      function(asked, tell)      one line of JSON on stdin
    heard(value)                        ◀──      tell(value)                a line of JSON each on stdout
    value                               ◀──      return value               the last line

1. The function belongs to a module; what it is asked, tells and returns is JSON. Large results go by file.
2. What a library prints is not taken for a line of these: it goes to standard error, whose end is kept to say why the
   child died. With NBL_EXPORT_DEBUG set it is shown.
3. An :class:`NblError` or an ``OSError`` of the function is raised in the parent. Anything else that ends the child,
   and a limit that it passes, is a :class:`ChildError`.
4. The child does not outlive :func:`in_child`, whatever that raises, nor a parent that is killed.
5. The child imports from where the parent does, and from no other folder.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from nbl_export.errors import BuildError, NblError
from nbl_export.running_time import RunningTime

Tell = Callable[[Any], None]
Work = Callable[[Any, Tell], Any]

_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from nbl_export.child_process import main; main()"
_TICK = 0.5  # seconds between two looks at the limits
_KEPT = 8192  # bytes of what the child wrote last
OUT_OF_MEMORY = "ran out of memory"  # the reason of a child that did
_PR_SET_PDEATHSIG = 1  # sys/prctl.h
# Loaded here: a process that has just been forked must not load a library, another thread may hold the loader's lock.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Limits:
    """When a child is given up: ``seconds`` in all, ``idle`` seconds without a word, ``memory`` bytes (POSIX only)."""

    seconds: float | None = None
    idle: float | None = None
    memory: int | None = None


class ChildError(BuildError):
    """A child process died, failed or passed a limit. ``reason`` says how; ``signal`` is the one that ended it."""

    def __init__(self, what: str, reason: str, remedy: str, ended_by: int | None = None) -> None:
        super().__init__(f"{what} {reason}: {remedy}.")
        self.reason, self.signal = reason, ended_by


def in_child(
    function: Work,
    asked: Any,
    what: str,
    remedy: str,
    limits: Limits | None = None,
    heard: Tell = lambda value: None,
) -> Any:
    """``function(asked, tell)``, computed in a child process; ``heard`` is called with each value that it tells.

    ``what`` begins the sentence of a :class:`ChildError` and ``remedy`` ends it: "Building of X" "died by SIGSEGV" "use
    another exporter".
    """
    limits = limits or Limits()
    path = [entry or str(Path.cwd()) for entry in sys.path]
    order = {
        "module": function.__module__,
        "function": function.__qualname__,
        "asked": asked,
        "memory": limits.memory,
        "parent": os.getpid(),
    }
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", _BOOT, json.dumps(path)],  # (5)
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("NBL_EXPORT_DEBUG") else subprocess.PIPE,
    )
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    end = bytearray()
    readers = [threading.Thread(target=_put_lines, args=(process.stdout, lines), daemon=True)]
    if process.stderr is not None:
        readers.append(threading.Thread(target=_keep_end, args=(process.stderr, end), daemon=True))
    try:
        for reader in readers:
            reader.start()
        assert process.stdin is not None
        try:  # it stays open: its end tells the child that there is no parent any more
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # the child has died, which its output says
        kind, value = _answer(lines, limits, heard)
        if kind == "died":
            process.wait()
    finally:  # (4)
        if process.poll() is None:
            process.kill()
            process.wait()
        for reader in readers:
            reader.join(1)  # a process that the child left behind may hold its standard error
        for stream, reader in zip((process.stdout, process.stderr), readers, strict=False):
            if stream is not None and not reader.is_alive():
                stream.close()
        _close(process.stdin)
    if kind == "returned":
        return value
    if kind == "NblError":
        raise _class_of(value["class"], value["exit_code"])(value["text"])
    if kind == "OSError":
        raise OSError(*value)
    if kind == "died":
        last = (end.decode(errors="replace").strip().splitlines() or [""])[-1].strip()
        raise ChildError(what, death(process.returncode, last), remedy, max(0, -process.returncode) or None)
    raise ChildError(what, value, remedy)


def death(code: int, last: str = "") -> str:
    """How a process ended that gave no answer, from its exit code and the ``last`` line that it wrote."""
    if code >= 0:
        return f"ended with exit code {code}" + (f" ({last.rstrip('.')[:300]})" if last else "")
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"died by {name}" + (", often because memory ran out" if name == "SIGKILL" else "")


def _answer(lines: queue.SimpleQueue[bytes | None], limits: Limits, heard: Tell) -> tuple[str, Any]:
    """The last message, or which limit was passed. Time in which this process stood still itself does not count."""
    idle = total = 0.0
    clock = RunningTime(2 * _TICK)
    while True:
        clock.since_last()  # what was heard took its time, too
        try:
            line = lines.get(timeout=_TICK)
        except queue.Empty:
            line = b""
        passed = clock.since_last()
        idle, total = idle + passed, total + passed
        if line is None:
            return "died", None
        kind, value = _message(line)
        if kind == "told":
            idle = 0.0
            heard(value)
        elif kind:
            return kind, value
        if limits.seconds is not None and total > limits.seconds:
            return "limit", f"took longer than {limits.seconds:,g} s"
        if limits.idle is not None and idle > limits.idle:
            return "limit", f"made no progress in {limits.idle:,g} s"


def _message(line: bytes) -> tuple[str, Any]:
    try:
        kind, value = json.loads(line)
    except (ValueError, TypeError):
        return "", None  # no line of ours (2)
    return str(kind), value


def _put_lines(stream: IO[bytes], lines: queue.SimpleQueue[bytes | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _keep_end(stream: IO[bytes], end: bytearray) -> None:
    while block := os.read(stream.fileno(), 1 << 16):
        end += block
        del end[:-_KEPT]


def _close(stream: IO[bytes] | None) -> None:
    try:
        if stream is not None:
            stream.close()
    except BrokenPipeError:
        pass  # what was not written is for nobody any more


def _class_of(name: str, exit_code: int) -> type[NblError]:
    """The error class called ``name``, or else the plain one with that exit code."""
    found, open_ = {NblError.__name__: NblError}, [NblError]
    while open_:
        for kind in open_.pop().__subclasses__():
            found[kind.__name__] = kind
            open_.append(kind)
    with_code = [kind for kind in found.values() if kind.exit_code == exit_code]
    return found.get(name) or (with_code or [NblError])[0]


# The child ---------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Do what stdin asks for; the process ends here, without the exit handlers of any library."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    order = json.loads(sys.stdin.buffer.readline())
    _end_with(order["parent"])
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # (2)

    def send(kind: str, value: Any) -> None:
        answers.write(json.dumps([kind, value]).encode() + b"\n")
        answers.flush()

    send(*_done(order, lambda value: send("told", value)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _done(order: dict[str, Any], tell: Tell) -> tuple[str, Any]:
    try:
        if order["memory"] is not None:
            _limit_memory(order["memory"])
        work: Any = importlib.import_module(order["module"])
        for name in order["function"].split("."):
            work = getattr(work, name)
        return "returned", work(order["asked"], tell)
    except ChildError as error:  # of a child of this one
        return "NblError", {
            "class": BuildError.__name__,
            "exit_code": BuildError.exit_code,
            "text": str(error),
        }
    except NblError as error:
        return "NblError", {"class": type(error).__name__, "exit_code": error.exit_code, "text": str(error)}
    except MemoryError:
        return "failed", OUT_OF_MEMORY
    except OSError as error:
        return "OSError", [error.errno, error.strerror or str(error), error.filename and str(error.filename)]
    except BaseException as error:
        if os.environ.get("NBL_EXPORT_DEBUG"):
            raise
        first = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:300]
        return "failed", f"failed ({type(error).__name__}: {first})"


def _limit_memory(limit: int) -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends; on Linux only."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _end_with(parent: int) -> None:
    """End this process when its parent does, killed or not (4)."""
    if sys.platform == "linux":  # at once, also while a library holds Python's lock
        die_with_parent()
        if os.getppid() != parent:
            os._exit(1)

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
