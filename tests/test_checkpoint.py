"""Long work: saved when it is time, saved and stopped at the first interrupt, stopped at once at the second."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from nbl_export.checkpoint import Checkpoint, saving_to
from tests.interruptions import send


class Saved:
    """Counts what is saved where."""

    def __init__(self) -> None:
        self.paths: list[Path] = []

    def __call__(self, path: Path) -> None:
        self.paths.append(path)


@pytest.fixture
def saved() -> Saved:
    return Saved()


def test_what_takes_long_is_saved_from_time_to_time(tmp_path: Path, saved: Saved) -> None:
    with saving_to(Checkpoint(tmp_path / "c", every_seconds=0.05), saved) as between:
        between()
        assert saved.paths == []
        time.sleep(0.06)
        between()
        between()  # the clock starts again
        assert saved.paths == [tmp_path / "c"]
        time.sleep(0.06)
        between()
    assert saved.paths == [tmp_path / "c"] * 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_interrupt_waits_for_the_next_step_and_saves(
    tmp_path: Path, saved: Saved, signum: int
) -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), saving_to(Checkpoint(tmp_path / "c"), saved) as between:
        for step in range(3):
            steps.append(step)
            if step == 1:
                send(signum)()
                assert saved.paths == []  # held back
            between()
    assert steps == [0, 1] and saved.paths == [tmp_path / "c"]


def test_the_second_interrupt_stops_at_once(tmp_path: Path, saved: Saved) -> None:
    reached = False
    with pytest.raises(KeyboardInterrupt), saving_to(Checkpoint(tmp_path / "c"), saved):
        send(signal.SIGINT)()
        send(signal.SIGINT)()
        reached = True
    assert not reached and saved.paths == []


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_handlers_are_as_before_when_it_is_over(tmp_path: Path, saved: Saved, ends: str) -> None:
    def mine(*_: object) -> None:
        raise AssertionError("the handler of somebody else was called")

    before = signal.signal(signal.SIGTERM, mine)
    try:
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            with saving_to(Checkpoint(tmp_path / "c"), saved):
                assert signal.getsignal(signal.SIGTERM) is not mine
                if ends == "badly":
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert signal.getsignal(signal.SIGTERM) is mine and signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGTERM, before)
