"""Models whose last layers attend to the keys and values of an earlier one, the whole way."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from nbl_export import api
from nbl_export.graph.cache import kv_layers
from nbl_export.graph.io import load_graph
from tests.exhaustive import exhaustive
from tests.tiny import save_tokenizer
from tests.tiny_types import tiny_model

TEXT = api.CalibrateSettings(samples=16, seq_len=64, heldout_samples=2)
CHECKS = api.VerifySettings(decode_steps=3, contexts=(16,), rounds=3, speed=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models of which layers 2 and 3 attend to the keys and values of layers 0 and 1."""
    root = tmp_path_factory.mktemp("shared")

    @cache
    def made(kind: str) -> Path:
        tiny_model(kind).save_pretrained(root / kind)
        save_tokenizer(root / kind)
        return root / kind

    return made


@pytest.mark.parametrize(
    ("kind", "form"), [("gemma3n_text", "concat"), pytest.param("gemma4_text", "static", marks=exhaustive)]
)
def test_a_layer_that_borrows_is_linearized_alone(
    kind: str, form: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    report = api.run(
        folders(kind),
        tmp_path / "out",
        api.SelectSettings(k=1),
        TEXT,
        CHECKS,
        exporting=api.ExportSettings(kv_cache=form),
    )
    assert report.passed
    assert {c.layer for c in report.selection.candidates} == {2, 3}
    assert report.selection.others["1"] == "full: its keys and values are read by layer 3"
    before, after = report.graph.before, report.graph.after
    # The cache is the lenders', and they stay.
    assert before.kv_pairs == after.kv_pairs == 2
    assert before.ops["Attention"] - after.ops["Attention"] == 1
    assert kv_layers(load_graph(tmp_path / "out" / "model.onnx")) == (0, 1)
    assert "1 attention layer and 0 KV pairs gone" in report.checks[0].detail
    table = api.inspect(tmp_path / "out" / "baseline" / "model.onnx")[-1]
    rows = {row[0]: row[-1] for row in table.rows}
    assert rows["0"] == "no: no other layer reads its keys and values (found: read by 2)"
    assert rows["2"] == rows["3"] == "yes"


def test_all_that_borrow_are_linear_and_repaired(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """By losses that start at a later block, and by training that goes through both kinds of layers."""
    selection = api.SelectSettings(k=2, criterion="kl", repair=2, fit_input="residual")
    report = api.run(folders("gemma4_text"), tmp_path / "out", selection, TEXT, CHECKS)
    assert report.passed and set(report.selection.layers) == {2, 3}


def test_a_layer_that_lends_is_refused_before_any_work(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(
        api.NblError, match=r"--layers names layer 1, .* \(full: its keys and values are read by layer 3\)"
    ):
        api.run(folders("gemma4_text"), tmp_path / "out", api.SelectSettings(layers=(1, 3)), TEXT)
    with pytest.raises(api.NblError, match=r"--k is 3; it must be between 0 and 2"):
        api.run(folders("gemma4_text"), tmp_path / "out", api.SelectSettings(k=3), TEXT)
    assert not (tmp_path / "out" / "nbl" / "moments").exists()
