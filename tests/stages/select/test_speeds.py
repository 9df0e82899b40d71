"""How many layers a wanted speed takes: by bisection, with times that are made up and with real ones."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export import api
from nbl_export.errors import BudgetError, InputError
from nbl_export.files import TEMPORARY
from nbl_export.runtime import session as sizes
from nbl_export.stages.select import choose, speeds
from nbl_export.stages.select.speeds import SpeedMeter, Speedups
from nbl_export.verify.speed import pair as pair_module
from nbl_export.verify.speed.pair import measure_speed
from tests.listening import Notes
from tests.stages.select.by_hand import candidates, curve, forget, select


def test_bisection_times_few() -> None:
    for most in (1, 2, 7, 30, 64):
        for least in range(1, most + 1):
            asked: list[int] = []

            class Faked(SpeedMeter):
                def __init__(self, least: int, asked: list[int]) -> None:
                    self.context, self.least, self.asked = 511, least, asked

                def __call__(self, k: int) -> Speedups:
                    self.asked.append(k)
                    return Speedups(2.0, None) if k >= self.least else Speedups(1.0, 9.0)

            assert Faked(least, asked).least_k(1.5, most) == least
            assert len(asked) <= 1 + math.ceil(math.log2(most)) if most > 1 else len(asked) == 1


def test_a_speed_out_of_reach_and_one_that_costs_too_much(out: Path, timed: list[int]) -> None:
    with pytest.raises(BudgetError, match=r"--min-speedup 1\.6 is out of reach at 511 tokens: 5 .* 1\.50"):
        select(out, api.SelectSettings(budget=api.Budget(min_speedup=1.6)))
    assert timed == [5], "whether it can be had at all comes first"
    points = curve(out)
    between = (points[1]["kl"] + points[2]["kl"]) / 2
    with pytest.raises(
        BudgetError, match=r"--min-speedup 1\.35 needs 4 linear layers, and the loss allows 2 \(K = 1 costs"
    ):
        select(out, api.SelectSettings(budget=api.Budget(max_kl=between, min_speedup=1.35)))
    plan = select(out, api.SelectSettings(budget=api.Budget(max_kl=between, min_speedup=1.05)))
    assert len(plan.chosen) == 2, "as many as the loss allows"
    assert len(select(out, api.SelectSettings(budget=api.Budget(min_speedup=1.25))).chosen) == 3


def test_a_speed_without_a_graph_names_the_command(out: Path) -> None:
    forget(out, "export")
    with pytest.raises(InputError, match=rf"no finished `export` yet: run `nbl-export export {out}` first"):
        select(out, api.SelectSettings(budget=api.Budget(min_speedup=1.1)))
    # A budget of loss alone is kept without: the curve then has no speeds, and a note says why.
    notes = Notes()
    select(out, api.SelectSettings(budget=api.Budget(max_kl=100.0)), notes)
    assert any(n.startswith("The K curve has no speeds: the model is not exported yet") for n in notes.notes)
    assert all(p["prefill_speedup"] is None for p in candidates(out)["curve"]["points"])


def test_points_that_are_timed() -> None:
    assert list(choose._timed_ks([1], 1)) == [1]
    assert list(choose._timed_ks(range(1, 4), 0)) == [1, 2, 3]
    assert list(choose._timed_ks(range(1, 33), 9)) == [8, 9, 16, 24, 32]
    # With spans not every K is there.
    assert list(choose._timed_ks([2, 6, 7, 13, 20], 7)) == [6, 7, 13, 20]


def test_a_trial_graph_has_only_its_own_weights_and_is_gone_afterwards(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads all others from the unmodified graph's file; a graph of another K is no part of it."""
    written: list[int] = []
    before = (out / "baseline" / "model.onnx").read_bytes()

    def measured(pair: Any, contexts: Any, rounds: int, listener: Any, anew: bool) -> Any:
        graph = onnx.load(str(pair.linearized), load_external_data=False).graph
        places = Counter(e.value for t in graph.initializer for e in t.external_data if e.key == "location")
        (own,) = set(places) - {"baseline/model.onnx.data"}
        written.append((out / own).stat().st_size)
        assert 4 * 64 * 8 * places[own] == written[-1], "up and down of each layer; b is in the graph"
        return measure_speed(pair, contexts, rounds, listener, anew)

    monkeypatch.setattr(pair_module, "measure_speed", measured)
    monkeypatch.setattr(speeds, "CONTEXT", 16)
    monkeypatch.setattr(speeds, "ROUNDS", 3)
    select(out, api.SelectSettings(criterion="nmse", budget=api.Budget(max_kl=100.0), rank=8))
    assert written == [2 * 4 * 64 * 8 * k for k in choose._timed_ks(range(1, 6), 5)]
    assert not list(out.glob(f"*{TEMPORARY}"))
    assert all(
        p["prefill_speedup"] is None or p["prefill_speedup"] > 0 for p in candidates(out)["curve"]["points"]
    )
    assert candidates(out)["curve"]["context"] == 16
    assert (out / "baseline" / "model.onnx").read_bytes() == before


@pytest.mark.parametrize(("times", "anew"), [(1.5, True), (0.5, None)])
def test_graphs_that_do_not_fit_together_are_timed_in_turns_or_not_at_all(
    out: Path, monkeypatch: pytest.MonkeyPatch, times: float, anew: bool | None
) -> None:
    asked: list[bool] = []

    def measured(pair: Any, contexts: Any, rounds: int, listener: Any, anew: bool) -> Any:
        asked.append(anew)
        return measure_speed(pair, contexts, 1, listener)

    session = sizes.session_bytes(out / "baseline" / "model.onnx")
    monkeypatch.setattr(sizes, "free_memory", lambda: int(times * session))
    monkeypatch.setattr(pair_module, "measure_speed", measured)
    monkeypatch.setattr(speeds, "CONTEXT", 16)
    notes = Notes()
    select(out, api.SelectSettings(criterion="nmse", budget=api.Budget(max_kl=100.0)), notes)
    assert set(asked) == ({anew} if anew is not None else set())
    said = [n for n in notes.notes if "The K curve has no speeds: a session needs about" in n]
    assert len(said) == (anew is None)
