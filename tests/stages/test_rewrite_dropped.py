"""`--keep-baseline no`: the unmodified graph goes after the verification, and what needs it says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.graph.io import load_graph
from nbl_export.graph.tensors import external_files
from tests.finished import QUICK, TWO, assert_same, state

NO = api.FolderSettings("no")


@pytest.fixture(scope="module")
def dropped(
    stories_out: Path, stories_folder: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The finished run, run again without its baseline."""
    out = tmp_path_factory.mktemp("dropped") / "out"
    shutil.copytree(stories_out, out)
    text = api.CalibrateSettings((str(stories_text),), samples=32, seq_len=128, heldout_samples=8)
    assert api.run(stories_folder, out, TWO, text, QUICK, folder=NO).passed
    return out


@pytest.fixture
def out(dropped: Path, tmp_path: Path) -> Path:
    shutil.copytree(dropped, tmp_path / "out")
    return tmp_path / "out"


def test_the_linearized_graph_stands_alone(dropped: Path, stories_out: Path) -> None:
    assert not (dropped / "baseline").exists()
    path = dropped / "model.onnx"
    assert external_files(load_graph(path)) == [path.with_name("model.onnx.data")]
    onnx.checker.check_model(str(path))
    assert onnx.load(str(path)) == onnx.load(str(stories_out / "model.onnx"))
    before = stories_out / "baseline" / "model.onnx.data"
    assert path.with_name("model.onnx.data").stat().st_size < before.stat().st_size


VERBS: dict[str, Callable[[Path], Any]] = {
    "verify": lambda out: api.verify(out, api.VerifySettings(quality=False, speed=False, decode_steps=2)),
    "bench": lambda out: api.bench(out, api.BenchSettings(batches=(1,), contexts=(16,))),
    "eval": lambda out: api.evaluate(out, api.EvalSettings()),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_needs_it_says_so(out: Path, verb: str) -> None:
    with pytest.raises(
        InputError,
        match=r"has no unmodified graph any more \(--keep-baseline no\): run `nbl-export export .*` first\.$",
    ):
        VERBS[verb](out)


def test_an_export_makes_it_again(out: Path, stories_out: Path) -> None:
    api.export(out)
    for name in ("model.onnx", "model.onnx.data"):
        assert_same(out / "baseline" / name, stories_out / "baseline" / name)
    # The graph that stands alone is still of it.
    assert api.verify(out, api.VerifySettings(quality=False, speed=False, decode_steps=2)).passed
    assert "dropped" not in state(out)["export"] or not state(out)["export"]["dropped"]
