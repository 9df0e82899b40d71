"""Today's commands survive the short run of scripts/crash.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_the_short_run(shared_data: Path, tmp_path: Path) -> None:
    arguments = ["--kills", "12", "--seed", "1", "--only", "foreign", "--work", str(tmp_path / "work")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "crash.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "NBL_EXPORT_SHARED": str(shared_data.parent)},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"(\d+) kills, (\d+) failures, ", done.stdout)[-1] == ("12", "0"), done.stdout
