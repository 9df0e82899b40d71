"""Handle what this process is to whoever started it: signals that end it, and streams that may be closed or full.

1. SIGTERM and SIGHUP end it as Ctrl-C does: what is unfinished is cleaned up, one sentence is said, and the exit code
   is the shell's, 128 + the signal's number. A library may swallow what a signal raises within it (torch.export has
   such places): it is raised again at the next step of the work (:func:`stop_if_asked`). Or it makes another error of
   it, as C++ does that calls Python: whatever fails after a signal came is told as the interrupt, and what the library
   logs of it is not.
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
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from nbl_export.checkpoint import in_main_thread, on_signals
from nbl_export.errors import Interrupted
from nbl_export.ranks import place

asked: list[int] = []  # the signals that came


class Stream:
    """The stream ``to``, but writing never fails: ``lost`` is the first error, after which nothing is written.

    ``to`` is None for a stream that was closed from the start. What is written while it is not ``heard`` is dropped.
    """

    def __init__(self, to: TextIO | None) -> None:
        self.heard = place().first
        self.lost = None if to else OSError(errno.EBADF, "it is closed")
        self._to = to or Path(os.devnull).open("w")  # noqa: SIM115, since it is a stream

    def write(self, text: str) -> int:
        self._do(lambda: self._to.write(text))
        return len(text)

    def flush(self) -> None:
        self._do(self._to.flush)

    def _do(self, what: Callable[[], object]) -> None:
        if self.heard and self.lost is None:
            try:
                what()
            except OSError as error:
                self.lost = error
                # What it still holds is written when it is closed, and must not fail again then.
                with suppress(OSError, ValueError), Path(os.devnull).open("w") as nothing:
                    os.dup2(nothing.fileno(), self._to.fileno())

    def isatty(self) -> bool:
        return self.heard and self._to.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_to"], name)


@contextmanager
def streams() -> Iterator[Stream]:
    """The standard output within the block, in which it and the standard error are :class:`Stream`."""
    before = sys.stdout, sys.stderr
    for number in range(3):  # the next file would take the number of a closed stream, and get its output
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):  # shows another sign for what its encoding does not have
            stream.reconfigure(errors="replace")
    sys.stdout, sys.stderr = Stream(before[0]), Stream(before[1])  # type: ignore[assignment]
    try:
        yield sys.stdout  # type: ignore[misc]
        sys.stderr.flush()
    finally:
        sys.stdout, sys.stderr = before


@contextmanager
def signals() -> Iterator[None]:
    """Within the block, SIGINT, SIGTERM and SIGHUP raise :class:`Interrupted`."""

    def end(signum: int) -> None:
        asked.append(signum)
        logging.disable()
        raise Interrupted(signum)

    try:
        with on_signals(end):
            yield
    finally:
        asked.clear()
        logging.disable(logging.NOTSET)


def stop_if_asked() -> None:
    """Raises :class:`Interrupted` if a signal asked this process to end and it still works."""
    if asked and in_main_thread():
        raise Interrupted(asked[-1])
