"""Speed of two graphs, and milliseconds of workloads: what is timed and put together. No time is asserted."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nbl_export.records import from_json, to_json
from nbl_export.runtime import session as sessions
from nbl_export.runtime.session import session_bytes
from nbl_export.settings.workload import Workload
from nbl_export.verify.speed import candidates
from nbl_export.verify.speed import pair as module
from nbl_export.verify.speed.candidates import Candidate
from nbl_export.verify.speed.ceiling import graph_cost
from nbl_export.verify.speed.pair import Pair, anew_or_why_not, measure_speed, workload_ms
from nbl_export.verify.speed.race import Harness
from nbl_export.verify.speed.values import Machine, Roofline, Speed


def test_structure_of_a_measurement(pair: Pair) -> None:
    speed = measure_speed(pair, (8, 20), 3)
    assert speed.rounds == 3 and speed.machine.device == "CPUExecutionProvider" and speed.machine.threads
    assert [(c.phase, c.batch, c.context) for c in speed.cells] == [
        ("prefill", 1, 8),
        ("decode", 1, 8),
        ("prefill", 1, 20),
        ("decode", 1, 20),
    ]
    costs = graph_cost(pair.base), graph_cost(pair.linearized)
    assert [(c.name, c.base, c.cost) for c in speed.candidates] == [
        ("base", None, costs[0]),
        ("linearized", "base", costs[1]),
    ]
    assert len(speed.speedups()) == 4 and speed.machine.roofline is not None
    for cell, result, over in speed.speedups():
        for one in cell.results:
            assert 0 < one.timing.low_ms <= one.timing.median_ms <= one.timing.high_ms
        assert 0 < over.low <= over.value <= over.high
        assert over.least <= over.value <= over.most
        if over.resolved:
            assert over.least > 1 or over.most < 1
        # Fewer than six rounds never resolve anything.
        assert 6 <= result.rounds <= 9 and (over.resolved or result.rounds == 9)
        times = [speed.machine.roofline.seconds(c.work(cell.phase, cell.context)) for c in costs]
        assert result.ceiling == times[0] / times[1] > 1
    raw = to_json(speed)
    assert len(raw["cells"]) == 4 and raw["cells"][1]["phase"] == "decode"
    assert from_json(Speed, raw, "it", "do it again") == speed


@pytest.mark.parametrize(("times", "how"), [(2.3, False), (1.5, True), (0.5, "skipped")])
def test_sessions_are_both_there_or_take_turns_or_are_not_made(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, times: float, how: bool | str
) -> None:
    """By what is free, in units of the larger session."""
    largest = max(session_bytes(path) for path in (pair.base, pair.linearized))
    monkeypatch.setattr(sessions, "free_memory", lambda: int(times * largest))
    found = anew_or_why_not(pair.base, pair.linearized)
    assert found is how or (how == "skipped" and "a session needs about" in str(found))


def test_in_turns_one_session_is_there_at_a_time(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = made = 0
    real = candidates.OrtModel

    def model(*args: Any, **others: Any) -> Any:
        nonlocal most, made
        one = real(*args, **others)
        alive.add(one)
        made, most = made + 1, max(most, len(alive))
        return one

    monkeypatch.setattr(candidates, "OrtModel", model)
    speed = measure_speed(pair, (8,), 3, anew=True)
    assert most == 1 and made >= 2 * 2 * 4  # two graphs, two phases, three rounds and one before them
    assert [(c.phase, [r.name for r in c.results]) for c in speed.cells] == [
        ("prefill", ["base", "linearized"]),
        ("decode", ["base", "linearized"]),
    ]
    assert all(r.cache_bytes > 0 for r in speed.cells[1].results)


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
