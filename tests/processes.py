"""The command line as a process, processes that work together or are killed, and listeners that write down."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import pickle
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nbl_export import cli
from nbl_export.progress import Silent, Task
from nbl_export.ranks import Ranks, together

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "TERM": "xterm"}
for _name in ("NBL_EXPORT_DEBUG", "PYTEST_CURRENT_TEST"):
    ENVIRONMENT.pop(_name, None)
SMALL = ["--samples", "16", "--seq-len", "64", "--heldout-samples", "4"]
FAST = ["--decode-steps", "2", "--contexts", "8", "--rounds", "3"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def nbl(*arguments: object, cwd: Path | None = None, limit: int | None = None) -> Done:
    """`nbl-export ARGUMENTS` in this process; ``limit`` is the largest file in bytes that it may write."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["nbl-export", *map(str, arguments)])
        patch.delenv("NBL_EXPORT_DEBUG", raising=False)
        if cwd is not None:
            patch.chdir(cwd)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited[0] if limit is None else limit, unlimited[1]))
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    return Done(code, out.getvalue(), err.getvalue())


def assert_refused(done: Done, code: int, *words: str, quietly: bool = True) -> None:
    """One sentence on stderr, nothing on stdout, the exit code; ``quietly``: and nothing else at all."""
    assert done.code == code, done
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.err
    assert done.err.rstrip().endswith(errors[0]), done.err
    assert "Traceback" not in done.err and "Internal error" not in done.err
    assert done.out == ""
    for word in words:
        assert word in errors[0], errors[0]
    if quietly:
        assert done.err.splitlines() == errors


def no_leftovers(out: Path) -> None:
    assert [
        p for p in out.rglob("*") if p.name.endswith(".tmp") or p.name.startswith((".onnx", ".taps"))
    ] == []


def interrupted(pattern: str, *arguments: object, delay: float = 0.0) -> Done:
    """Run, send SIGINT ``delay`` seconds after ``pattern`` shows on the terminal, wait for the end."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "nbl_export", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=slave,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    os.close(slave)
    seen = b""
    sent = False
    with contextlib.suppress(OSError):  # the terminal ends with the process
        while block := os.read(master, 65536):
            seen += block
            if not sent and re.search(pattern.encode(), seen):
                sent = True
                time.sleep(delay)
                process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=120)
    os.close(master)
    assert sent, seen.decode(errors="replace")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode(errors="replace"))
    return Done(process.returncode, stdout.decode(), text)


def assert_interrupted(done: Done) -> None:
    assert done.code == 130, done
    assert "Traceback" not in done.err and "Internal error" not in done.err
    errors = [line.strip() for line in re.split(r"[\r\n]+", done.err) if "error: " in line]
    assert len(errors) == 1 and errors[0].startswith("error: Interrupted"), errors
    assert done.out == ""


# several processes ------------------------------------------------------------------------------


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


# listeners ----------------------------------------------------------------------------------------


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


def edit(path: Path, change: Callable[[Any], object]) -> None:
    """Do ``change`` to what a JSON file holds."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def flip(path: Path) -> None:
    """Change two bits in the middle of a file, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x41
    path.write_bytes(content)


def files_in(folder: Path) -> set[str]:
    """The files below ``folder``, by their names from there."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
