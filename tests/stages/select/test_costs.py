"""What was measured once is known again, for just that workload, rank, graph and machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbl_export.report import schema as environment_module
from nbl_export.settings.definition import AUTO
from nbl_export.stages.select.costs import KeptCosts
from nbl_export.workspace import Workspace


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    found = Workspace.create(tmp_path / "out")
    found.nbl.mkdir(exist_ok=True)
    return found


def test_times_are_of_a_workload_a_rank_and_a_graph(ws: Workspace) -> None:
    asked = [
        ("export", ("decode=8@16",), None),
        ("export", ("decode=8@16",), 8),
        ("export", ("decode=8@16",), AUTO),
        ("export", ("decode=8@32",), None),
        ("export", ("decode=8@16", "prefill=8"), None),
        ("another", ("decode=8@16",), None),
    ]
    for ms, (exported, workload, rank) in enumerate(asked):
        found = KeptCosts(ws, exported).times(workload, rank, lambda ms=ms: {"base": float(ms)})  # type: ignore[misc]
        assert found == {"base": float(ms)}

    def again() -> dict[str, float]:
        raise AssertionError("known")

    for ms, (exported, workload, rank) in enumerate(asked):
        assert KeptCosts(ws, exported).times(workload, rank, again) == {"base": float(ms)}


def test_another_machine_is_measured_itself(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    KeptCosts(ws, "export").times(("decode=8@16",), None, lambda: {"base": 1.0})
    here = environment_module.environment()
    monkeypatch.setattr(environment_module, "environment", lambda: replace(here, processor="another"))
    assert KeptCosts(ws, "export").times(("decode=8@16",), None, lambda: {"base": 2.0}) == {"base": 2.0}


def test_a_roofline_is_measured_once(ws: Workspace) -> None:
    first = KeptCosts(ws, "export").roofline()
    assert first == KeptCosts(ws, "another").roofline()
