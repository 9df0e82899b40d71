"""Listeners that write down or stop what they hear, and what stops work at any change of a folder."""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbl_export.progress import Silent, Task


class Notes(Silent):
    """Keeps notes, tasks and how far they came; it is its own task, whichever runs."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[tuple[str, int, str, int]] = []
        self.advanced: list[int] = []
        self.parts: list[tuple[int, int]] = []

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        self.tasks.append((title, total, unit, done))
        yield self

    def advance(self, amount: int) -> None:
        self.advanced.append(amount)

    def part(self, number: int, count: int) -> None:
        self.parts.append((number, count))

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def start(self) -> tuple[int, int]:
        """Of the last task: its total, and how much of it was done before."""
        _, total, _, done = self.tasks[-1]
        return total, done

    @property
    def kept(self) -> list[str]:
        """The stages that were done already."""
        return [note.split(":")[0] for note in self.notes if note.endswith("done already, kept.")]


def interruptible() -> None:
    """Hear SIGINT in this process, and in those that it starts, also if whoever started it had it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Recorder(Notes):
    """A listener that records, and does something at one of its calls."""

    def __init__(self, at: int = -1, action: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.at, self.action = at, action

    def advance(self, amount: int) -> None:
        super().advance(amount)
        if len(self.advanced) == self.at:
            self.action()


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def crash() -> None:
    raise RuntimeError("the power went")


# Python announces these before it does them.
_CHANGES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.truncate",
    "os.chmod",
    "os.link",
    "os.symlink",
}
# These it does not announce.
_CALLS = ("fsync", "pwrite", "copy_file_range")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def at_changes(folder: Path, told: Callable[[int], object]) -> None:
    """From now on, this process calls ``told`` just before it changes anything in ``folder``, with a number from 0."""
    seen, root = 0, str(folder)

    def change() -> None:
        nonlocal seen
        seen += 1
        told(seen - 1)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            if isinstance(args[0], str) and _inside(args[0]) and args[2] & _WRITES:
                change()
        elif event in _CHANGES and any(_inside(a) for a in args if isinstance(a, (str, Path))):
            change()

    def _inside(path: str | Path) -> bool:
        return str(Path.cwd() / path).startswith(root)

    def announced(call: Callable[..., Any]) -> Callable[..., Any]:
        def announce(*arguments: Any) -> Any:
            change()
            return call(*arguments)

        return announce

    sys.addaudithook(hook)
    for name in _CALLS:
        setattr(os, name, announced(getattr(os, name)))


def leave_what_was_there() -> None:
    """In a forked child: what its parent has left is not deleted here. Some of it would wait for its threads, which the
    child does not have.
    """
    gc.freeze()


def killed_at_change(number: int, folder: Path, work: Callable[[], object]) -> bool:
    """Do ``work`` in a process that is killed just before its change ``number`` of ``folder``.

    Returns False if it ends before.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        leave_what_was_there()
        try:
            at_changes(folder, lambda change: change == number and os.kill(os.getpid(), signal.SIGKILL))
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def files_in(folder: Path) -> set[str]:
    """The files below ``folder``, by their names from there."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
