"""Facts of real reports and graphs, each against what the report says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nbl_export.blocks import Mlp
from nbl_export.errors import InputError
from nbl_export.report.diff_facts import (
    Opened,
    model_facts,
    opened,
)
from nbl_export.report.evaluation import write_evaluation
from tests.report.diff_sides import report_of
from tests.report.test_evaluation import evaluation


def test_a_model_its_layers_and_what_was_asked(two: Opened) -> None:
    report = report_of(two)
    facts = model_facts(report)
    assert facts["linear layers"].figure.value == "2 of 5: 2, 3" and facts["linear layers"].members == (
        "2",
        "3",
    )
    assert facts["model"].figure.value == report.model.source
    said = {name: fact.figure.value for name, fact in facts.items()}
    assert (said["select: k"], said["export: precision"], said["export: kv_cache"]) == ("2", "fp32", "concat")
    assert (said["export: opset"], said["export: exporter"]) == ("23", "torch")
    assert said["verify: contexts"] == "16" and said["verify: quality"] == "yes"
    assert "select: rank" not in said, "what was not given is not there"
    chosen = replace(report.selection, layers=(2, Mlp(3)))
    assert model_facts(replace(report, selection=chosen))["linear layers"].members == ("2", "3.mlp")
    asked = {**report.settings, "verify": {"bound": {"max_kl": 0.5, "max_perplexity_ratio": None}}}
    within = model_facts(replace(report, settings=asked))
    assert within["verify: bound: max_kl"].figure.value == "0.5"
    assert "verify: bound: max_perplexity_ratio" not in within
    assert model_facts(None) == {}


# what is compared ------------------------------------------------------------------------------------


def test_what_lies_in_an_output_folder(stories_out: Path) -> None:
    side = opened(stories_out)
    assert side.kind == "report" and side.report is not None and side.graph is not None
    assert side.graph.linear == side.report.selection.layers
    path = stories_out / "report" / "report.json"
    for where in (path, path.parent):
        alone = opened(where)
        assert alone.kind == "report" and alone.report == side.report and alone.graph is None
    for where in (stories_out / "model.onnx", stories_out / "baseline"):
        graph = opened(where)
        assert graph.kind == "graph" and graph.header is None and graph.summary is not None


def test_an_evaluation_of_other_graphs_is_left_out(stories_copy: Path) -> None:
    write_evaluation(stories_copy / "report", evaluation())
    side = opened(stories_copy)
    assert side.evaluation is None and "eval.json is of other graphs, or was changed" in side.notes[0]


def test_an_edited_report_is_refused(stories_copy: Path) -> None:
    path = stories_copy / "report" / "report.json"
    path.write_text(path.read_text().replace('"documents": 4', '"documents": 5'))
    with pytest.raises(
        InputError, match=r"report\.json was changed after `verify` wrote it: run `nbl-export verify"
    ):
        opened(stories_copy)


def test_a_report_of_another_graph_is_refused(stories_copy: Path) -> None:
    with (stories_copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match=r"model\.onnx is not the graph that .*report\.json is about"):
        opened(stories_copy)


@pytest.mark.parametrize(
    "name", ["missing", "x.txt", "x.json", "list.json", "broken.json", "x.onnx", "empty"]
)
def test_anything_else_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    texts = {"x.json": '{"schema": "of somebody else"}', "list.json": "[1]", "broken.json": "{"}
    if name == "empty":
        (tmp_path / name).mkdir()
    elif name != "missing":
        (tmp_path / name).write_text(texts.get(name, "text"))
    with pytest.raises(InputError) as told:
        opened(tmp_path / name)
    assert str(tmp_path / name) in str(told.value) and "\n" not in str(told.value)
