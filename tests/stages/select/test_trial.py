"""Graphs to time while layers are chosen, and why there may be none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from nbl_export.files import TEMPORARY
from nbl_export.linearize.plan import DROPPED, load_plan
from nbl_export.progress import Silent
from nbl_export.runtime.ort import OrtModel
from nbl_export.stages.select.trial import trial_graph, why_not_timed
from nbl_export.workspace import Workspace
from tests.stages.select.by_hand import forget


def test_two_trial_graphs_are_there_at_the_same_time_and_gone_after_an_error(stories_out: Path) -> None:
    ws = Workspace.open(stories_out)
    plan = replace(load_plan(ws.plan), layers={})
    one, two = (dict.fromkeys(layers, DROPPED) for layers in ((0,), (1, 2)))
    found: list[Path] = []
    with (
        pytest.raises(ZeroDivisionError),
        trial_graph(ws, plan, one, "one", Silent()) as a,
        trial_graph(ws, plan, two, "two", Silent()) as b,
    ):
        found += [a, b]
        pairs = [len(OrtModel(path).interface.cache) for path in found]
        assert pairs == [4, 3] and all(path.parent == ws.root for path in found)
        assert len(onnx.load(str(a), load_external_data=False).graph.input) > 0
        raise ZeroDivisionError
    assert not list(stories_out.glob(f"*{TEMPORARY}"))


def test_why_nothing_is_timed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not_timed(Workspace.open(out)) is None
    monkeypatch.setattr("nbl_export.runtime.session.free_memory", lambda: 1000)
    assert "a session needs about" in (why_not_timed(Workspace.open(out)) or "")
    forget(out, "export")
    assert "the model is not exported yet (nbl-export export" in (why_not_timed(Workspace.open(out)) or "")
