"""What was found of a form comes back from its file, and its table has a row for each check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbl_export.checks import Check
from nbl_export.errors import InputError
from nbl_export.files import write_json
from nbl_export.records import to_json
from nbl_export.report.card import without_paths
from nbl_export.report.forms import Conversion, conversions_in, forms_table, kept_conversion, stage_of
from nbl_export.report.schema import Report
from nbl_export.report.tables import report_tables
from nbl_export.workspace import Workspace

CHECKS = (Check("parity", "passed", "near"), Check("tokens", "failed", "token 3"))
FORM = Conversion("gguf/model-F16.gguf", 3 << 20, ("1", "2.mlp"), CHECKS)


def test_one_check_that_fails_fails_the_form() -> None:
    assert not FORM.passed and replace(FORM, checks=CHECKS[:1]).passed
    skipped = replace(CHECKS[1], status="skipped")
    assert replace(FORM, checks=(skipped,)).passed


def test_it_comes_back_from_its_file(stories_copy: Path) -> None:
    ws = Workspace.open(stories_copy)
    write_json(ws.conversion("gguf", "fp16"), to_json(FORM))
    assert kept_conversion(ws, "gguf", "fp16") == FORM
    assert conversions_in(ws) == {}, "no stage says that it is done"
    ws.conversion("gguf", "fp16").write_text("{")
    with pytest.raises(InputError, match=r"conversion .*run `nbl-export convert .* --to gguf` again"):
        kept_conversion(ws, "gguf", "fp16")
    assert stage_of("gguf", "fp16") == "convert gguf fp16"


def test_the_report_has_a_row_for_each_check(report: Report) -> None:
    assert "Other engines" not in [table.title for table in report_tables(report)]
    with_forms = replace(report, forms={"gguf fp16": FORM})
    (table,) = (t for t in report_tables(with_forms) if t.title == "Other engines")
    assert table == forms_table({"gguf fp16": FORM})
    size = "3.0 MiB"
    assert table.rows == (
        ("gguf fp16", FORM.file, size, "", "parity", "passed", "near"),
        ("gguf fp16", FORM.file, size, "", "tokens", "failed", "token 3"),
    )
    assert not without_paths(with_forms).forms, "a package has no such file"
