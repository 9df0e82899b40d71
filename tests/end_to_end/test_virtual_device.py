"""No tensor of the CPU meets the model on a device, shown without one: :mod:`tests.on_device` on a virtual device.

With a real GPU the same tests run in ``tests/gpu``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export import api
from nbl_export.packages import pip_line
from nbl_export.runtime import session as sessions
from nbl_export.stages import run
from nbl_export.stages.run import graphs_on
from nbl_export.workspace import Workspace
from tests.on_device import *  # noqa: F403
from tests.on_device import CHECKS
from tests.processes import Notes
from tests.virtual_device import Mixed, virtual_device


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """The virtual device, which is what cuda means here."""
    find = run.find_device
    with virtual_device() as found, pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "find_device", lambda asked: found if asked == "cuda" else find(asked))
        yield found


def test_it_is_a_device_of_its_own(device: torch.device) -> None:
    there, here = torch.arange(6.0).reshape(2, 3).to(device), torch.ones(2, 3)
    assert there.device == torch.device("virtual", 0) and (there + there).device == there.device
    for mixed in (lambda: there + here, lambda: there @ here.T, lambda: torch.cat([there, here])):
        with pytest.raises((Mixed, RuntimeError), match=r"same device|on virtual and on cpu"):
            mixed()


def test_parity_is_that_of_the_device(
    finished: tuple[Path, api.Report],
    tmp_path: Path,
    cuda_sessions: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graphs run in CUDA beside the model, and what was verified elsewhere does not stand for it."""
    cuda = (sessions.CUDA, {"use_tf32": "0"})
    for module in (sessions, run):
        monkeypatch.setattr(module, "provider_on", lambda name: cuda if name == "virtual:0" else sessions.CPU)
    out = Path(shutil.copytree(finished[0], tmp_path / "out"))
    report = api.verify(out, replace(CHECKS, device="cuda"))
    assert report.passed and cuda in [providers[0] for providers in cuda_sessions]
    record = Workspace.open(out).record("verify")
    assert record and (record.settings["device"], record.settings["graphs"]) == ("virtual", "virtual")
    notes = Notes()
    api.verify(out, replace(CHECKS, device="cpu"), notes)
    assert "verify: done again, since it was made with another device." in notes.notes
    after = Workspace.open(out).record("verify")
    assert after and after.device == "cpu" and not {"device", "graphs"} & set(after.settings)


def test_where_onnxruntime_has_no_cuda_a_note_says_so(device: torch.device) -> None:
    notes = Notes()
    with graphs_on(device, notes):
        assert sessions._running.get() == sessions.CPU
    assert notes.notes == ["onnxruntime does not run on virtual:0 here: graphs run on the CPU."]
    with graphs_on(torch.device("cuda:0"), notes), graphs_on(torch.device("cpu"), notes):
        pass
    assert len(notes.notes) == 2 and pip_line("gpu") in notes.notes[1]
