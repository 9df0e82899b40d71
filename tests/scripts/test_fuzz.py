"""Mutants of every file that a command reads: none is an error of nbl-export itself, a hang, or a wrong pass."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import ROOT
from tests.exhaustive import ALL
from tests.scripted import script


@pytest.fixture(scope="module")
def mutants() -> ModuleType:
    return script("mutants")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks loaded libraries and measures their memory")
def test_a_short_campaign_finds_nothing(stories_folder: Path, stories_text: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "fuzz.py"), str(stories_folder), str(stories_text)]
    mutants = "200" if ALL else "12"
    done = subprocess.run([*command, "--mutants", mutants, "--seed", "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert f"0 of {mutants} went wrong" in done.stdout


def test_a_seed_gives_the_same_mutant_again(mutants: ModuleType, tmp_path: Path) -> None:
    path, kept = tmp_path / "a.json", set()
    tree = {"a": [1, 2.5, "x"], "b": {"c": None, "d": True}}
    for seed in (*range(40), *range(40)):
        path.unlink(missing_ok=True)
        path.write_text(json.dumps(tree))
        how = mutants.mutate(path, random.Random(seed), tmp_path / "victim")
        plain = path.is_file() and not path.is_symlink()
        kept.add((seed, how, path.read_bytes() if plain else b""))
        if path.is_dir():
            path.rmdir()
    assert len(kept) == 40 and len({content for _, _, content in kept}) > 25


def test_raw_pieces_are_written_as_they_are(mutants: ModuleType) -> None:
    assert mutants.dumped({"a": mutants.RAW + "99", "b": ["x"]}) == b'{"a": 99, "b": ["x"]}'
