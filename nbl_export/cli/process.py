"""What this process is to whoever started it: the signals that end it, and streams that may be closed or full.

1. SIGTERM and SIGHUP end it as Ctrl-C does: what is unfinished is cleaned up, one sentence is said, and the exit code
   is the shell's, 128 + the signal's number. A signal that was ignored from the start (SIGHUP under nohup, SIGINT of a
   shell's background job) stays ignored. A library may swallow what a signal raises within it (torch.export has such
   places): it is raised again at the next step of the work (:func:`stop_if_asked`). Or it makes another error of it,
   as C++ does that calls Python: what fails after a signal came is told as the interrupt (:func:`as_interrupts`), and
   what the library logs of it is not.
2. A stream that nobody reads ends the output, never the work. Where the results could not be written for another
   reason, that is said at the end, and the exit code is not 0.
3. Of several processes (:mod:`nbl_export.ranks`), the first alone writes to its streams, but for the sentence of an
   error, which one of them says.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from nbl_export.errors import Interrupted
from nbl_export.ranks import is_first

UNWRITTEN = 2
# The signals that end the process, and the handler that each has where nobody asked for another.
_ENDING: dict[int, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGHUP: signal.SIG_DFL,
}
_asked: list[int] = []  # the signals that came


def run(work: Callable[[], int]) -> int:
    """The exit code of ``work``, during which signals and streams are handled as above."""
    with _streams() as (out, err):
        with _signals():
            code = work()
        out.flush()  # a signal that comes now ends the process at once: its work is done
        if out.lost is not None and out.lost.errno != errno.EPIPE:
            why = "it is closed" if out.lost.errno == errno.EBADF else out.lost.strerror
            err.write(
                f"error: The results could not be written to the standard output ({why}): give it a place.\n"
            )
            code = code or UNWRITTEN
    return code


class Output(io.TextIOBase):
    """The stream ``to``, but writing never fails: ``lost`` is the first error, after which nothing is written.

    ``to`` is None for a stream that was closed from the start. What is written while it is not ``heard`` is dropped.
    """

    def __init__(self, to: TextIO | None, heard: bool = True) -> None:
        self._to, self.heard = to, heard
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        self._do(lambda to: to.write(text))
        return len(text)

    def flush(self) -> None:
        if self._to is not None:
            self._do(lambda to: to.flush())

    def _do(self, what: Callable[[TextIO], object]) -> None:
        if self.lost is not None or not self.heard:
            return
        if self._to is None:
            self.lost = OSError(errno.EBADF, os.strerror(errno.EBADF))
            return
        try:
            what(self._to)
        except OSError as error:
            self.lost = error
            # What it still holds is written when it is closed, and must not fail again then.
            with suppress(OSError, ValueError), Path(os.devnull).open("w") as nothing:
                os.dup2(nothing.fileno(), self._to.fileno())

    def isatty(self) -> bool:
        return self.heard and self._to is not None and self._to.isatty()

    def fileno(self) -> int:
        if self._to is None:
            raise io.UnsupportedOperation("fileno")
        return self._to.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._to, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return getattr(self._to, "errors", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_to"], name)


def aloud() -> None:
    """From now on, what this process says of an error is heard."""
    if isinstance(sys.stderr, Output):
        sys.stderr.heard = True


@contextmanager
def _streams() -> Iterator[tuple[Output, Output]]:
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):  # shows another sign for what its encoding does not have
            stream.reconfigure(errors="replace")
    _fill_descriptors()
    out, err = Output(sys.stdout, is_first()), Output(sys.stderr, is_first())
    sys.stdout, sys.stderr = out, err
    try:
        yield out, err
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            if stream is not None:
                with suppress(OSError, ValueError):
                    stream.flush()


def _fill_descriptors() -> None:
    """Open nothing in place of a closed standard stream: the next file would take its number, and get its output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number


@contextmanager
def _signals() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return

    def end(signum: int, _frame: Any) -> None:
        _asked.append(signum)
        logging.disable()
        raise Interrupted(signum)

    changed = {s: signal.signal(s, end) for s, default in _ENDING.items() if signal.getsignal(s) is default}
    try:
        yield
    finally:
        for signum, before in changed.items():
            signal.signal(signum, before)
        go_on()


@contextmanager
def as_interrupts() -> Iterator[None]:
    """Raises :class:`Interrupted` for whatever fails in the block after a signal came."""
    try:
        yield
    except Exception as error:
        if _asked:
            raise Interrupted(_asked[-1]) from error
        raise


def stop_if_asked() -> None:
    """Raises :class:`Interrupted` if a signal asked this process to end and it still works."""
    if _asked and threading.current_thread() is threading.main_thread():
        raise Interrupted(_asked[-1])


def go_on() -> None:
    """Forget the signals that came: what they asked for is done, or it was for a line being typed."""
    if _asked:
        _asked.clear()
        logging.disable(logging.NOTSET)
