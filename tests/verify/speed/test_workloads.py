"""Milliseconds of workloads: of prefills and decodes by hand, and of graphs that really run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nbl_export.settings.workload import Workload
from nbl_export.verify.speed import workloads as module
from nbl_export.verify.speed.candidates import Candidate
from nbl_export.verify.speed.pair import Pair
from nbl_export.verify.speed.race import Harness
from nbl_export.verify.speed.values import Machine, Roofline
from nbl_export.verify.speed.workloads import workload_ms

MACHINE = Machine("cpu", 1, roofline=Roofline("cpu", "float32", 1, 1e9, 1e9))


class Told:
    """Takes seconds that grow with the cell; it decodes only after a prefill."""

    def __init__(self, times: float, context: int, batch: int) -> None:
        self.seconds = {"prefill": times * context * batch, "decode": times * batch}
        self.filled = False

    def prefill(self) -> None:
        self.filled = True

    def rewind(self) -> None:
        assert self.filled

    def step(self) -> None:
        assert self.filled

    def memory_bytes(self) -> int:
        return 0


@pytest.fixture
def asked(told: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[tuple[int, int]]]]:
    """Graphs by name that take as many times as long as their name says; what was raced of them."""
    cells: list[tuple[str, Sequence[tuple[int, int]]]] = []
    measure = Harness.measure

    def measured(self: Harness, wanted: Sequence[tuple[int, int]], listener: Any = None) -> Any:
        cells.append((self.phases[0], wanted))
        return measure(self, wanted, listener)

    def candidate(name: str, path: Path, base: str | None = None, **_: Any) -> Candidate:
        return Candidate(name, lambda context, batch=1: Told(float(path.name), context, batch), base)

    monkeypatch.setattr(Harness, "measure", measured)
    monkeypatch.setattr(module, "graph_candidate", candidate)
    monkeypatch.setattr(module, "cpu_machine", lambda: MACHINE)
    return cells


def test_milliseconds_by_hand(asked: list[Any]) -> None:
    works = [Workload(prefill=10), Workload(prefill=20, decode=4, context=100, batch=2, weight=3)]
    found = workload_ms(Path("2"), {"linear": Path("1")}, works)
    # 10 tokens; three times two rows of 20, and of 4 tokens one by one.
    each = 1e3 * (10 + 3 * (2 * 20 + 4 * 2))
    assert found == {"base": pytest.approx(2 * each), "linear": pytest.approx(each)}
    assert asked == [("prefill", [(1, 10), (2, 20)]), ("decode", [(2, 102)])]


def test_a_decode_alone_needs_no_prefill_race(asked: list[Any]) -> None:
    found = workload_ms(Path("2"), {"a": Path("1"), "b": Path("4")}, [Workload(decode=2, context=8)])
    assert found == {"base": pytest.approx(4e3), "a": pytest.approx(2e3), "b": pytest.approx(8e3)}
    assert [phase for phase, _ in asked] == ["decode"]


@pytest.mark.parametrize("anew", [False, True])
def test_graphs_really_run(pair: Pair, monkeypatch: pytest.MonkeyPatch, anew: bool) -> None:
    monkeypatch.setattr(module, "ROUNDS", 1)
    monkeypatch.setattr(module, "cpu_machine", lambda: MACHINE)
    work = [Workload(prefill=16, decode=2, context=24, batch=2)]
    found = workload_ms(pair.base, {"one": pair.linearized, "two": pair.base}, work, anew=anew)
    assert list(found) == ["base", "one", "two"] and all(ms > 0 for ms in found.values())
