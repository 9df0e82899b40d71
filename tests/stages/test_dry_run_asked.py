"""What is asked of a run can be asked of a dry run, word for word; on the command line it is an option."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from nbl_export import api
from tests.command_line import nbl


def test_a_dry_run_takes_what_a_run_takes() -> None:
    run, dry = (inspect.signature(one) for one in (api.run, api.dry_run))
    assert run.parameters == dry.parameters


@pytest.mark.parametrize("said", [["--json"], ["--k", "99"]])
def test_the_option_does_nothing_but_answer(tiny_folder: Path, tmp_path: Path, said: list[str]) -> None:
    done = nbl(tiny_folder, "--k", 2, "-o", tmp_path / "out", "--dry-run", *said, cwd=tmp_path)
    assert not list(tmp_path.iterdir())
    if "99" in said:
        assert done.code == 2 and "--k is 99; it must be between 0 and 4" in done.err
        return
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert answer["command"] == "dry-run" and answer["problems"] == []
    assert len(answer["stages"]) == 5 and answer["stages"][0]["stage"] == "calibrate"
    assert all(one["kept"] is False and one["files"] for one in answer["stages"])
