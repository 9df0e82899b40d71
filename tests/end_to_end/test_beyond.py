"""A model with a window, the whole way: its report says how what begins there was crossed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nbl_export import api
from nbl_export.export import checks
from nbl_export.models.lengths import Room
from nbl_export.report.render import write_report
from nbl_export.report.schema import load_report
from nbl_export.verify import case as crossing
from tests.beyond import BEYOND
from tests.exhaustive import exhaustive
from tests.tiny import save_tokenizer

TEXT = api.CalibrateSettings(samples=8, seq_len=64, heldout_samples=2)
VERIFY = api.VerifySettings(decode_steps=4, quality=False, speed=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    BEYOND["mistral"].model().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("large", [pytest.param(False, marks=exhaustive), True])
def test_the_report_says_what_crossed_a_window(
    folder: Path, tmp_path: Path, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(checks, "REHEARSAL", Room(0.0))
        original = crossing.crossed_by
        monkeypatch.setattr(crossing, "crossed_by", lambda *a: original(*a, Room(0.0)))
    out = tmp_path / "out"
    exporting = api.ExportSettings(precision="fp32" if large else "fp16")
    report = api.run(folder, out, api.SelectSettings(k=1), TEXT, VERIFY, exporting=exporting)
    assert report.passed, report.checks
    said = f"sliding_window 100: crossed {'on a copy with 16' if large else 'by the rows'}"
    assert {c.name: (c.status, c.detail) for c in report.checks}["lengths"] == ("passed", said)
    (one,) = report.parity.crossings  # type: ignore[union-attr]
    assert (one.tokens, one.layers, one.how) == (100, (0, 1), "copy" if large else "rows")
    assert one.prompts == (() if large else (108, 98))
    page = (out / "report" / "report.md").read_text(encoding="utf-8")
    assert f"Lengths from which on the model computes something else: {said}." in page
    alone = "and of 98, 108 tokens each by itself"
    assert (alone in page) is not large
    assert load_report(out / "report" / "report.json") == report
    write_report(tmp_path / "again", report)

    # A report that was made before lengths were known is read all the same.
    raw = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    del raw["parity"]["crossings"], raw["graph"]["copies"]
    (tmp_path / "older.json").write_text(json.dumps(raw), encoding="utf-8")
    older = load_report(tmp_path / "older.json")
    assert older.parity.crossings == () and older.graph.copies == ()  # type: ignore[union-attr]
