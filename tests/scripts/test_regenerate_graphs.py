"""graphs/ is what the exporters and the rewrite make today."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import MissingDependencyError
from tests.exhaustive import exhaustive

ROOT = Path(__file__).parents[2]


def _script() -> Any:
    spec = importlib.util.spec_from_file_location(
        "regenerate_graphs", ROOT / "scripts" / "regenerate_graphs.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SCRIPT = _script()


USUAL = ("genai-int4-llama", "optimum-phi", "torch-phi3")
PAIRS = [
    pytest.param(pair, id="-".join(pair), marks=() if "-".join(pair) in USUAL else exhaustive)
    for pair in SCRIPT.PAIRS
]


@pytest.mark.parametrize("pair", PAIRS)
def test_reference_graphs_are_up_to_date(tmp_path: Path, pair: tuple[str, str]) -> None:
    try:
        written = SCRIPT.write_graphs(tmp_path, [pair])
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert [p.name for p in written] == ["before.txt", "after.txt"]
    for path in written:
        name = path.relative_to(tmp_path)
        fresh, kept = path.read_text(), (ROOT / "graphs" / name).read_text()
        assert fresh == kept, f"{name} changed; if that is meant: python scripts/regenerate_graphs.py"


def test_no_other_graphs_are_kept() -> None:
    kept = {p.parent.name for p in (ROOT / "graphs").rglob("*.txt")}
    assert kept == {"-".join(pair) for pair in SCRIPT.PAIRS}


@pytest.mark.parametrize("pair", SCRIPT.PAIRS, ids="-".join)
def test_one_of_two_attentions_is_linear_afterwards(pair: tuple[str, str]) -> None:
    before, after = ((ROOT / "graphs" / "-".join(pair) / f"{n}.txt").read_text() for n in ("before", "after"))
    cores = ("= Attention(", "= Softmax(", "GroupQueryAttention(")
    counts = [sum(text.count(core) for core in cores) for text in (before, after)]
    assert counts == [2, 1]
    assert "nbl_linear" not in before
    # Stored as its neighbours are: one weight and a bias, or numbers, scales and a bias.
    assert after.count("nbl_linear") == (3 if "int4" in pair[0] else 2)
    for text, pairs in ((before, 2), (after, 1)):
        assert text.count("past_key_values.") >= 2 * pairs
        assert f"past_key_values.{pairs}." not in text
