"""Signals that end the process, and standard streams that are closed, full, or read by nobody."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from nbl_export.cli import process
from nbl_export.cli.bars import TerminalListener
from nbl_export.errors import InputError, Interrupted
from tests.command_line import ENVIRONMENT, Done, assert_refused
from tests.interruptions import send
from tests.rewrite.foreign import Source, assert_rewritten, contents, exported


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return exported(tmp_path)


def ended(command: list[object], setup: Callable[[], object] = lambda: None, **how: Any) -> Done:
    """`nbl-export COMMAND` in a process that is set up as the test says."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    done = subprocess.run(
        [sys.executable, "-m", "nbl_export", *map(str, command)],
        env=ENVIRONMENT,
        timeout=120,
        preexec_fn=lambda: setup() and None,
        check=False,
        **streams,
    )
    return Done(done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode())


def closed_pipe() -> int:
    """The end to write to of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


# streams -----------------------------------------------------------------------------------------


def test_results_that_nobody_reads_are_no_error(source: Source) -> None:
    """As in `nbl-export inspect X | head -1`."""
    writing = closed_pipe()
    assert ended(["inspect", source.graph], stdout=writing) == Done(0, "", "")
    os.close(writing)


def test_a_full_device_is_said_when_the_work_is_done(source: Source) -> None:
    with Path("/dev/full").open("w") as full:
        done = ended(["inspect", source.graph], stdout=full)
    assert_refused(done, 2, "No space left on device")


def test_no_file_is_opened_in_place_of_a_closed_stream(source: Source) -> None:
    """Or what a library prints would be written into the graph."""

    def close() -> None:
        for number in range(3):
            os.close(number)

    done = ended([*source.arguments("-o", source.out)], close, stdin=None, stdout=None, stderr=None)
    assert done.code == 2  # there was nowhere to show the result
    assert_rewritten(source.out / "model.onnx", source.plan)


# signals -----------------------------------------------------------------------------------------

INTERRUPTING = """
import os, sys
from nbl_export import cli
from nbl_export.rewrite import replace

real = replace.count

def interrupted(*args, **options):
    os.kill(os.getpid(), {signum})
    return real(*args, **options)

replace.count = interrupted
cli.main()
"""


def ended_by(signum: int, source: Source, before: Any, *more: object) -> Done:
    """A rewrite that sends itself the signal when the new graph is written and not yet in place."""
    command = [
        sys.executable,
        "-c",
        INTERRUPTING.format(signum=int(signum)),
        *map(str, source.arguments(*more)),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
        preexec_fn=lambda: signal.signal(signum, before) and None,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("signum", SIGNALS)
def test_every_signal_cleans_up_and_says_one_sentence(source: Source, signum: int) -> None:
    before = contents(source.folder)
    done = ended_by(signum, source, signal.SIG_DFL, "-o", source.out)
    assert_refused(
        done, SIGNALS[signal.Signals(signum)], "Interrupted; run the same command again", quietly=False
    )
    assert contents(source.folder) == before and not source.out.exists()


def test_a_signal_that_is_ignored_from_the_start_stays_ignored(source: Source) -> None:
    done = ended_by(signal.SIGHUP, source, signal.SIG_IGN, "-o", source.out)
    assert done.code == 0, done
    assert_rewritten(source.out / "model.onnx", source.plan)


@pytest.mark.parametrize("signum", SIGNALS)
def test_an_interrupt_that_a_library_swallows_ends_the_work_at_its_next_step(signum: int) -> None:
    reached: list[str] = []

    def work() -> int:
        with TerminalListener().task("Exporting ONNX", 3, "steps") as task:
            with suppress(KeyboardInterrupt):
                send(signum)()
            reached.append("behind the library")
            task.advance(1)
            reached.append("the next step")
        return 0

    usual = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(signum, usual)
    try:
        with pytest.raises(Interrupted) as ended:
            process.run(work)
        assert ended.value.exit_code == SIGNALS[signal.Signals(signum)]
        assert process.run(lambda: process.stop_if_asked() or 0) == 0  # of an earlier command
    finally:
        signal.signal(signum, before)
    assert reached == ["behind the library"]


@pytest.mark.parametrize("signum", SIGNALS)
def test_an_interrupt_that_a_library_makes_an_error_of_is_one(
    signum: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As C++ does that calls Python; the library says so in its log, too."""

    def library(*_: object, **__: object) -> int:
        try:
            send(signum)()
        except KeyboardInterrupt as interrupt:
            logging.getLogger("a library").error("fake tensor raised TypeError")
            raise InputError("torch.onnx.export cannot export LlamaForCausalLM") from interrupt
        return 0

    main = import_module("nbl_export.cli.main")
    monkeypatch.setattr(sys, "argv", ["nbl-export", "export", "out"])
    monkeypatch.setattr(main, "app", library)
    monkeypatch.setattr(main, "words_of", list)
    usual = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(signum, usual)
    try:
        assert process.run(main._command) == SIGNALS[signal.Signals(signum)]
    finally:
        signal.signal(signum, before)
    said = capsys.readouterr().err
    assert said.startswith("error: Interrupted; run the same command again") and said.count("\n") == 1
    logging.getLogger("a library").error("of the next command")
    assert [record.message for record in caplog.records] == ["of the next command"]


def test_an_interrupt_of_a_line_that_is_typed_asks_for_nothing_else() -> None:
    def work() -> int:
        with suppress(KeyboardInterrupt):
            send(signal.SIGTERM)()
        process.go_on()
        process.stop_if_asked()
        return 5

    assert process.run(work) == 5
