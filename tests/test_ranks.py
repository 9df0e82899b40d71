"""Several processes share their work: what each gets, which errors they raise, and who says them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbl_export import api, ranks
from nbl_export.errors import CalibrationError, InputError
from nbl_export.models.weights import room
from nbl_export.ranks import (
    ALONE,
    Job,
    LostRankError,
    Ranks,
    asked,
    begin,
    on_this_machine,
    place,
)
from tests.processes import forked


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def of_torchrun(monkeypatch: pytest.MonkeyPatch, rank: object, count: object) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(count))


def test_one_process_does_everything_itself() -> None:
    assert begin() == ALONE and place().first and ranks.speaks()
    ranks.end()
    assert ALONE.first and ALONE.mine([1, 2, 3]) == [1, 2, 3]
    assert ALONE.shared(lambda: 7) == 7 and ALONE.each(lambda: 7) == [7]
    assert ALONE.spread([1, 2, 3], lambda share: [10 * i for i in share]) == [10, 20, 30]
    sums = torch.ones(2)
    ALONE.add_up([sums])
    assert sums.tolist() == [1, 1]


@pytest.mark.parametrize(("rank", "count"), [("one", 2), (2, 2), (-1, 2)])
def test_what_is_no_rank_is_refused(monkeypatch: pytest.MonkeyPatch, rank: object, count: object) -> None:
    of_torchrun(monkeypatch, rank, count)
    with pytest.raises(InputError, match=rf"RANK={rank} and WORLD_SIZE={count}.*torchrun"):
        asked()
    assert place().first and place().count == 1


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert on_this_machine() == 1  # of no torchrun
    free = SimpleNamespace(available=8 << 20)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    assert room() == 4 << 20
    of_torchrun(monkeypatch, 3, 16)
    assert on_this_machine() == 8 and room() == 1 << 19
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert on_this_machine() == 1


def test_work_is_shared_spread_and_added_up(tmp_path: Path) -> None:
    def work(here: Ranks) -> Any:
        def own(share: Any) -> Any:
            return [(item, here.rank) for item in share]

        made = here.shared(lambda: {"from": here.rank, "array": torch.arange(3)})
        # Also fewer items than processes.
        spread = here.spread(list("abcde"), own), here.spread(["z"], own), here.spread([], own)
        sums = torch.full((2, 2), 1.0 if here.rank else 2.0**-50, dtype=torch.float64)
        here.add_up([sums])
        place = here.rank, here.count, here.first
        return place, made["from"], made["array"].tolist(), spread, sums.tolist()

    found = forked(3, tmp_path, work)
    spread = [(item, at % 3) for at, item in enumerate("abcde")], [("z", 0)], []
    for rank, (here, made_by, array, of_all, _) in enumerate(found):
        assert (here, made_by, array) == ((rank, 3, rank == 0), 0, [0, 1, 2]) and of_all == spread
    assert found[0][-1] == [[2 + 2.0**-50] * 2] * 2, "in float64, in the first process"


def test_an_error_of_one_is_the_error_of_all(tmp_path: Path) -> None:
    def first(here: Ranks) -> Any:
        def refuse() -> None:
            raise CalibrationError("Layer 3 is odd: look at it.")

        here.shared(refuse)

    def last(here: Ranks) -> Any:
        def refuse(share: Any) -> Any:
            if "c" in share:
                raise InputError("The item c is odd: leave it out.")
            return share

        here.spread(list("abc"), refuse)

    def leading(here: Ranks) -> Any:
        if not here.first:
            here.follow(dict)
        with here.leading():
            raise InputError("The first one is odd: leave it out.")

    cases = (first, CalibrationError, "Layer 3"), (last, InputError, "item c"), (leading, InputError, "first")
    for work, kind, words in cases:
        found = forked(3, tmp_path, work)
        assert [type(error) for error in found] == [kind] * 3
        assert len({str(error) for error in found}) == 1 and words in str(found[0])


def refusing(share: Sequence[int], base: int) -> list[int]:
    if 7 in share:
        raise InputError("7 is odd: leave it out.")
    return [base + item for item in share]


def test_the_first_leads_and_the_others_follow(tmp_path: Path) -> None:
    def work(here: Ranks) -> Any:
        done: list[list[int]] = []

        def job(share: Sequence[int], base: int) -> list[int]:
            done.append(list(share))
            return refusing(share, base)

        jobs: dict[str, Job] = {"job": job}
        if not here.first:
            here.follow(lambda: jobs)
            return done
        with here.leading():
            found = [here.ask(jobs, "job", [1, 2, 3], 10)]
            with pytest.raises(InputError, match="7 is odd"):
                here.ask(jobs, "job", [1, 7], 10)
            found.append(here.ask(jobs, "job", [4], 20))
        return found

    assert forked(2, tmp_path, work) == [[[11, 12, 13], [24]], [[2], [7], []]]


@pytest.mark.parametrize("victim", [0, 1])
def test_who_loses_a_process_says_so_once(tmp_path: Path, victim: int) -> None:
    def work(here: Ranks) -> Any:
        here.shared(lambda: None)
        if here.rank == victim:
            (tmp_path / str(here.rank)).write_bytes(b"\x80\x04N.")
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            for _ in range(9):
                here.each(lambda: here.rank)
        except LostRankError as error:
            return str(error), error.exit_code, ranks.speaks()

    found = forked(3, tmp_path, work)
    assert found.pop(victim) is None
    for sentence, code, _ in found:
        assert sentence.startswith(
            "One of the 3 processes ended, or does not answer: run the same command again"
        )
        assert code == 143
    assert sorted(spoken for _, _, spoken in found) == [False, True]


def test_processes_that_are_not_there_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "TIMEOUT", timedelta(seconds=1))
    of_torchrun(monkeypatch, 0, 2)
    with pytest.raises(InputError, match="The 2 processes do not find each other"):
        begin()
    assert ranks._current is None


@pytest.mark.parametrize(
    "work",
    [
        lambda: api.run("nowhere", "out", api.SelectSettings(k=1)),
        lambda: api.export("nowhere"),
        lambda: api.rewrite_onnx("nowhere", "plan", "out"),
    ],
    ids=["run", "export", "rewrite --onnx"],
)
def test_a_command_of_one_process_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]
) -> None:
    of_torchrun(monkeypatch, 1, 4)
    with pytest.raises(InputError, match=r"one process, and was started in 4.*without"):
        work()
