"""The model card: its front matter, its figures, the license of the base, and no paths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nbl_export.report.card import license_of, model_card, without_paths
from nbl_export.report.schema import Report, load_report
from nbl_export.report.summary import headlines, model_name


@pytest.fixture
def report(stories_out: Path) -> Report:
    return load_report(stories_out / "report" / "report.json")


def front_matter(card: str) -> dict[str, object]:
    _, header, _ = card.split("---\n", 2)
    found: dict[str, object] = yaml.safe_load(header)
    return found


def test_a_model_of_the_hub_is_named_as_the_base(report: Report) -> None:
    named = replace(report, model=replace(report.model, source="org/stories", kind="hub"))
    card = model_card(without_paths(named), "apache-2.0")
    assert front_matter(card) == {
        "license": "apache-2.0",
        "base_model": "org/stories",
        "library_name": "onnx",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "neural-block-linearization", "nbl-export"],
    }
    assert "[org/stories](https://huggingface.co/org/stories)" in card
    assert "2 of 5 attention layers replaced by one affine map each" in card
    assert "apache-2.0, as the base model's files say." in card
    for one in headlines(report):
        assert f"| **{one.name}** | {one.value} |" in card
    assert "![" in card and "(report/plots/speed.png)" in card
    assert "onnxruntime_genai" in card and "nbl-export verify . --model" in card


def test_a_folder_s_path_is_its_name(report: Report, stories_folder: Path) -> None:
    public = without_paths(report)
    card = model_card(public)
    assert str(stories_folder.parent) in report.model.source and "/tmp" not in card
    assert "license" not in front_matter(card) and "which its files do not name" in card
    assert public.model.source == "stories260K" == model_name(report.model)
    assert public.selection.sources == tuple(Path(s).name for s in report.selection.sources)
    assert public.settings["calibrate"]["sources"] == list(public.selection.sources)
    assert public.parity == report.parity and public.checks == report.checks


def test_a_name_of_a_model_makes_nothing_but_text(report: Report) -> None:
    wrong = replace(
        report, model=replace(report.model, source='x](http://y) <script>"\n---\nlicense: mit', kind="hub")
    )
    card = model_card(wrong)
    assert front_matter(card).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "<script>" not in card and "\\](http://y)" in card  # which is no link


def test_the_license_is_what_the_base_s_card_says(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    card = tmp_path / "README.md"
    for text, expected in (
        ("---\nlicense: apache-2.0\n---\n# It", "apache-2.0"),
        ("# It has no front matter", None),
        ("---\nlicense: [a, b\n---\n", None),
        ("---\nlicense:\n  - mit\n---\n", None),
    ):
        card.write_text(text)
        assert license_of(tmp_path) == expected, text
