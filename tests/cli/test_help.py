"""Every help fits a screen of 100 columns and 50 lines, and says what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from nbl_export.cli.main import COMMANDS
from nbl_export.settings.definition import settings_of
from nbl_export.settings.file import TABLES

COLUMNS, LINES = 100, 50


def shown(*words: str) -> str:
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-m", "nbl_export", *words], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("command", [name for name in COMMANDS if name in TABLES])
def test_a_command_explains_all_its_options(command: str) -> None:
    text = shown(command, "-h")
    for one in settings_of(TABLES[command]):
        assert f"--{one.key}" in text
        assert " ".join(one.help.split()[:3]) in re.sub(r"[│\s]+", " ", text)
