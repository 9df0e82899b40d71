"""What the tests of foreign exporters share: fake interpreters, the environment that has optimum."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import exporters


@pytest.fixture(scope="session")
def optimum_python() -> str:
    """The Python of an environment with optimum; the test is skipped where there is none."""
    return exporters.optimum_python()


@pytest.fixture
def fake_python(tmp_path: Path) -> Callable[[str], str]:
    """An interpreter that has every module and, asked to run one, runs the given shell commands instead."""

    def write(commands: str) -> str:
        path = tmp_path / "fake-python"
        path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\n{commands}\n')
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """This interpreter without any installed package."""
    path = tmp_path / "bare-python"
    path.write_text(f'#!/bin/sh\nunset PYTHONPATH\nexec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    return str(path)
