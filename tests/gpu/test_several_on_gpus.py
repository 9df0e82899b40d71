"""Two processes of torchrun on the GPUs that are here: by NCCL with a GPU for each, by gloo if they share one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nbl_export import api
from nbl_export.calibrate.moments import ARRAYS, load_moments
from nbl_export.linearize.plan import load_plan
from nbl_export.workspace import Workspace
from tests.processes import torchrun

pytestmark = pytest.mark.gpu


def test_two_processes_on_gpus_give_what_one_gives(
    stories_folder: Path, stories_text: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    asked = api.CalibrateSettings(
        (str(stories_text),), samples=64, seq_len=128, heldout_samples=4, device="cuda"
    )
    api.calibrate(stories_folder, one, asked)
    plan = api.select(one, api.SelectSettings(k=2, device="cuda"))
    options = ["--calibration", stories_text, "--samples", 64, "--seq-len", 128, "--heldout-samples", 4]
    done = torchrun(2, "calibrate", stories_folder, "-o", two, *options, "--device", "cuda")
    assert done.code == 0, done
    want, found = (load_moments(Workspace.open(out).moments)[0].layers for out in (one, two))
    for index, layer in want.items():
        for name in ARRAYS:
            value = getattr(layer, name)
            gap = np.linalg.norm(getattr(found[index], name) - value)
            assert gap <= 1e-12 * np.linalg.norm(value), (index, name)
    done = torchrun(2, "select", two, "--k", 2, "--device", "cuda")
    assert done.code == 0, done
    assert load_plan(Workspace.open(two).plan).chosen == plan.chosen
