"""Work in a child process: answers, progress, errors of both kinds, and every way to die, each one sentence."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from nbl_export import errors
from nbl_export.errors import BuildError, CalibrationError, first_line, os_error_in_words
from nbl_export.processes import Checkpoint, ChildError, Tell, in_child, saving_to
from nbl_export.progress import bytes_task
from tests.processes import Notes, send

ROOT = Path(__file__).parent.parent
SECONDS = 60  # for what must end by itself

# What a child is asked to do ---------------------------------------------------------------------


def double(asked: Any, tell: Tell) -> Any:
    print("of a library", flush=True)
    os.write(2, b"x" * (1 << 22))
    for value in asked["tell"]:
        tell(value)
    return [2 * asked["value"], str(Path.cwd())]


def crashing(asked: Any, tell: Tell) -> Any:
    tell("begun")
    ctypes.string_at(0)


def ends(asked: Any, tell: Tell) -> Any:
    os.write(2, b"first line\nthe library's last words.\n")
    if asked < 0:
        os.kill(os.getpid(), -asked)
    os._exit(asked)


def hanging(asked: Any, tell: Tell) -> Any:
    for value in range(asked):
        tell(value)
        time.sleep(0.3)
    tell(os.getpid())
    # As a library does that holds Python's lock: no thread of Python's runs.
    ctypes.PyDLL(None).pause()


def raising(asked: Any, tell: Tell) -> Any:
    kinds: dict[str, Callable[[], BaseException]] = {
        "input": lambda: CalibrationError("Layer 3 is NaN: use --device cpu."),
        "disk": lambda: OSError(errno.ENOSPC, "No space left on device", "/somewhere/model.engine"),
        "python": lambda: TypeError("one\ntwo"),
        "memory": lambda: MemoryError(),
        "exit": lambda: SystemExit(0),
    }
    raise kinds[asked]()


# What the parent gets ----------------------------------------------------------------------------


def child(function: Callable[[Any, Tell], Any], asked: Any = None, **more: Any) -> Any:
    more = {"seconds": SECONDS, **more}
    return in_child(function, asked, "Building of X", "use another exporter", **more)


def sentence_of(function: Callable[[Any, Tell], Any], asked: Any = None, **more: Any) -> str:
    with pytest.raises(ChildError) as caught:
        child(function, asked, **more)
    assert isinstance(caught.value, BuildError) and caught.value.exit_code == 4
    text = str(caught.value)
    assert "\n" not in text and text.startswith("Building of X ") and text.endswith(": use another exporter.")
    return text.removeprefix("Building of X ").removesuffix(": use another exporter.")


def no_child() -> None:
    assert psutil.Process().children() == []


def test_it_computes_there_and_tells_on_the_way() -> None:
    heard: list[Any] = []
    tell = [1, "ö\ud800\n", {"a": [None, 0.5]}, float("inf")]
    assert child(double, {"value": 21, "tell": tell}, heard=heard.append) == [42, str(Path.cwd())]
    assert heard == tell
    no_child()


def test_a_crash_in_native_code_is_a_sentence() -> None:
    heard: list[Any] = []
    assert sentence_of(crashing, heard=heard.append) == "died by SIGSEGV"
    assert heard == ["begun"]
    no_child()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (-signal.SIGKILL, "died by SIGKILL, often because memory ran out"),
        (7, "ended with exit code 7 (the library's last words)"),
        (0, "ended with exit code 0 (the library's last words)"),
    ],
)
def test_whatever_ends_it_is_named(how: int, said: str) -> None:
    assert sentence_of(ends, how) == said
    with pytest.raises(ChildError) as caught:
        child(ends, how)
    assert caught.value.signal == (-how if how < 0 else None)


def test_a_silent_child_is_given_up_and_every_word_postpones_that() -> None:
    heard: list[Any] = []
    # Five values in 1.5 s: never a second without one.
    assert sentence_of(hanging, 5, seconds=1, heard=heard.append) == "made no progress in 1 s"
    assert heard[:5] == [0, 1, 2, 3, 4]
    assert not psutil.pid_exists(heard[-1])


def test_our_errors_come_back_as_they_were() -> None:
    with pytest.raises(CalibrationError, match=r"^Layer 3 is NaN: use --device cpu\.$"):
        child(raising, "input")
    with pytest.raises(OSError) as caught:
        child(raising, "disk")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/somewhere/model.engine")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("python", "failed (TypeError: one)"),
        ("memory", "ran out of memory"),
        ("exit", "failed (SystemExit: 0)"),
    ],
)
def test_other_errors_are_the_childs_failure(kind: str, said: str) -> None:
    assert sentence_of(raising, kind) == said


def test_an_interrupt_of_the_parent_ends_the_child() -> None:
    def heard(pid: int) -> None:
        assert psutil.pid_exists(pid)
        pids.append(pid)
        raise KeyboardInterrupt

    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        child(hanging, 0, heard=heard)
    assert not psutil.pid_exists(pids[0])
    no_child()


def test_a_parent_that_is_killed_leaves_no_orphan() -> None:
    """The child is deaf to Python: it waits in native code and holds the lock."""
    code = (
        "from tests.test_processes import *\n"
        "in_child(hanging, 0, 'It', 'wait', heard=lambda pid: print(pid, flush=True))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        orphan = psutil.Process(pid)
        process.kill()
        process.wait(timeout=SECONDS)
        # A dead process whose new parent has not looked yet is a zombie.
        psutil.wait_procs([orphan], timeout=SECONDS)
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


# checkpoint ----------------------------------------------------------------------------------------


def test_what_takes_long_is_saved_from_time_to_time(tmp_path: Path) -> None:
    saved: list[Path] = []
    with saving_to(Checkpoint(tmp_path / "c", every_seconds=0.05), saved.append) as between:
        between()
        assert saved == []
        time.sleep(0.06)
        between()
        between()  # the clock starts again
        assert saved == [tmp_path / "c"]
        time.sleep(0.06)
        between()
    assert saved == [tmp_path / "c"] * 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_interrupt_waits_for_the_next_step_and_saves(tmp_path: Path, signum: int) -> None:
    steps, saved = [], list[Path]()
    with pytest.raises(KeyboardInterrupt), saving_to(Checkpoint(tmp_path / "c"), saved.append) as between:
        for step in range(3):
            steps.append(step)
            if step == 1:
                send(signum)()
                assert saved == []  # held back
            between()
    assert steps == [0, 1] and saved == [tmp_path / "c"]


def test_the_second_interrupt_stops_at_once_and_handlers_are_as_before() -> None:
    before, reached = signal.getsignal(signal.SIGINT), False
    with pytest.raises(KeyboardInterrupt), saving_to(None, lambda _: None):
        send(signal.SIGINT)()
        send(signal.SIGINT)()
        reached = True
    assert not reached and signal.getsignal(signal.SIGINT) is before


# errors --------------------------------------------------------------------------------------------


def test_a_full_disk_says_what_to_do_and_that_nothing_is_lost() -> None:
    for number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        full = OSError(number, os.strerror(number), "model.onnx.data")
        text = str(os_error_in_words(full, "while writing the graph"))
        assert text.startswith("No room on the disk while writing the graph (model.onnx.data): ")
        assert "free some space" in text and "--output" in text and "finished stages are kept" in text


def test_a_short_write_of_numpy_is_a_full_disk() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError) as caught:
        np.zeros(1 << 20).tofile(full)
    assert str(os_error_in_words(caught.value, "while writing")).startswith(
        "No room on the disk while writing"
    )


def test_the_first_line_of_what_a_library_says() -> None:
    assert first_line(ValueError("\n One thing.\nAnother.")) == "One thing"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(KeyError(2)) == "KeyError: 2"


def test_an_interrupt_behind_the_error_of_a_library_is_found() -> None:
    def caught(first: BaseException, explicit: bool) -> BaseException:
        try:
            try:
                raise first
            except BaseException as error:
                raise RuntimeError("its own") from error if explicit else ValueError("another")
        except RuntimeError as error:
            return error

    interrupt = errors.Interrupted(15)
    assert errors.interrupt_behind(caught(interrupt, True)) is interrupt
    assert errors.interrupt_behind(caught(ValueError("no"), True)) is None
    assert errors.interrupt_behind(interrupt) is interrupt


# progress ------------------------------------------------------------------------------------------

MIB = 1 << 20


def test_a_task_of_bytes_is_whole_when_its_block_ends() -> None:
    listener = Notes()
    with bytes_task(listener, "Writing", 5 * MIB) as done:
        done(MIB)
        assert listener.advanced == [1]
    assert listener.tasks == [("Writing", 5, "MiB", 0)] and sum(listener.advanced) == 5
