"""An evaluation as a value, as tables and as files: each figure in its place, and nothing that was not asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from nbl_export.errors import InputError
from nbl_export.evaluate.results import (
    Both,
    Compared,
    Depth,
    Estimate,
    MeanRecovery,
    Means,
    RetrievalResult,
    TaskResult,
)
from nbl_export.models.source import ModelIdentity
from nbl_export.records import Check
from nbl_export.report.evaluation import (
    NAMES,
    Evaluation,
    evaluation_tables,
    load_evaluation,
    write_evaluation,
)
from nbl_export.report.schema import environment
from nbl_export.settings import EvalSettings

COMPARED = Compared(
    chance=0.25,
    base=Estimate(0.8, 0.011),
    linearized=Estimate(0.76, 0.012),
    difference=Estimate(-0.04, 0.013),
    agreement=0.9,
    recovery=Estimate(0.95, 0.014),
    above_chance=Estimate(0.9273, 0.015),
    base_above_chance=True,
)
FRUIT = TaskResult("fruit", "fruit.jsonl", "0", 40, 40, "acc", {"acc": COMPARED}, {"acc": Both(0.8, 0.76)})
WORDS = TaskResult("words", "words.jsonl", "1", 10, 10, None, {}, {"perplexity": Both(12.345, 13.5)})
DEPTHS = (Depth("0 to 25 %", 3, 1.0, 0.667), Depth("75 to 100 %", 3, 0.667, 0.333))
RETRIEVAL = tuple(
    RetrievalResult(n, 6, COMPARED, replace(COMPARED, chance=0.0, recovery=None), DEPTHS) for n in (256, 1024)
)
MEAN = MeanRecovery(1, Estimate(0.95, 0.014), Estimate(0.9273, 0.015), 1)


def evaluation(**changes: Any) -> Evaluation:
    fields: dict[str, Any] = {
        "created": "now",
        "tool_version": "1.0",
        "model": ModelIdentity("a/model", "folder", None, "0" * 64),
        "environment": environment(),
        "settings": EvalSettings(("fruit.jsonl",)),
        "hashes": {"base": "1"},
        "checks": (),
        "notes": (),
        "tasks": (FRUIT, WORDS),
        "retrieval": RETRIEVAL,
        "mean": Means(MEAN, MEAN),
    }
    return Evaluation(**{**fields, **changes})


def test_an_evaluation_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    for text in ("{", "[]", '{"schema": "nbl-export/eval/0"}', f'{{"schema": "{Evaluation.SCHEMA}"}}'):
        path.write_text(text)
        with pytest.raises(InputError, match="run `nbl-export eval` again"):
            load_evaluation(path)


def test_a_task_is_a_row_with_every_figure_in_its_column() -> None:
    table = evaluation_tables(evaluation())[0]
    assert table.columns == ("", "n", "guess", "base", "linear", "change", "recovery", "above chance")
    assert table.rows == (
        ("fruit, acc", "40", "25", "80.0 ± 1.1", "76.0 ± 1.2", "-4.0 ± 1.3", "95.0 ± 1.4", "92.7 ± 1.5"),
        # A perplexity is no share, and has no recovery.
        ("words, perplexity", "10", "", "12.35", "13.5", "", "", ""),
        ("mean", "", "", "", "", "", "95.0 ± 1.4", "92.7 ± 1.5"),
    )
    assert "over the 1 of 1 where the base is two standard errors above it: 92.7 ± 1.5 %." in table.note
    assert "sample" not in table.note


def test_it_comes_back_from_its_file_and_has_a_suite_only_with_checks(tmp_path: Path) -> None:
    plain, judged = evaluation(), evaluation(checks=(Check("mean recovery", "failed", "95 ± 1 %"),))
    assert [p.name for p in write_evaluation(tmp_path / "a", plain)] == list(NAMES[:2])
    assert [p.name for p in write_evaluation(tmp_path / "b", judged)] == list(NAMES)
    assert load_evaluation(tmp_path / "a" / "eval.json") == plain
    assert load_evaluation(tmp_path / "b" / "eval.json") == judged
    suite = ElementTree.parse(tmp_path / "b" / "eval-junit.xml").getroot().find("testsuite")
    assert suite is not None and (suite.get("tests"), suite.get("failures")) == ("1", "1")
    assert suite.find("testcase/failure") is not None
    (case,) = suite.iter("testcase")
    assert case.get("classname") == "nbl-export_eval-model"
