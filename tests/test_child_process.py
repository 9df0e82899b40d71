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

import psutil
import pytest

from nbl_export.child_process import ChildError, Tell, in_child
from nbl_export.errors import BuildError, CalibrationError

ROOT = Path(__file__).parent.parent
SECONDS = 60  # for what must end by itself

# What a child is asked to do ---------------------------------------------------------------------


def double(asked: Any, tell: Tell) -> Any:
    for value in asked["tell"]:
        tell(value)
    return [2 * asked["value"], str(Path.cwd())]


def noisy(asked: Any, tell: Tell) -> Any:
    print("of a library", flush=True)
    os.write(1, b"of a library")
    tell("ours")
    os.write(2, b"x" * (1 << 22))
    return "ours"


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
        "plain": lambda: OSError("nothing known"),
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


def test_what_a_library_prints_is_no_message() -> None:
    heard: list[Any] = []
    assert child(noisy, heard=heard.append) == "ours"
    assert heard == ["ours"]


def test_a_crash_in_native_code_is_a_sentence() -> None:
    heard: list[Any] = []
    assert sentence_of(crashing, heard=heard.append) == "died by SIGSEGV"
    assert heard == ["begun"]
    no_child()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (-signal.SIGABRT, "died by SIGABRT"),
        (-signal.SIGKILL, "died by SIGKILL, often because memory ran out"),
        (-signal.SIGTERM, "died by SIGTERM"),
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
    with pytest.raises(OSError, match="nothing known"):
        child(raising, "plain")


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


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_parent_that_ends_leaves_no_orphan(by: signal.Signals) -> None:
    """The child is deaf to Python: it waits in native code and holds the lock."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tests.test_child_process import *\n"
        "in_child(hanging, 0, 'It', 'wait', heard=lambda pid: print(pid, flush=True))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        orphan = psutil.Process(pid)
        process.send_signal(by)
        process.wait(timeout=SECONDS)
        # A dead process whose new parent has not looked yet is a zombie.
        psutil.wait_procs([orphan], timeout=SECONDS)
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_files_where_the_user_stands_are_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "queue", "psutil", "nbl_export"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user')")
    monkeypatch.chdir(tmp_path)
    assert child(double, {"value": 1, "tell": []}) == [2, str(tmp_path)]
