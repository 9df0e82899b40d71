"""The variants of the usual run are variants of tests that there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.exhaustive import USUAL

ROOT = Path(__file__).parent.parent


def test_what_is_named_is_there() -> None:
    files = sorted({f"tests/{name.partition('::')[0]}" for name in USUAL})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    there = set(done.stdout.splitlines())
    missing = [f"tests/{test}[{v}]" for test, variants in USUAL.items() for v in variants]
    assert [name for name in missing if name not in there] == []
