"""Reports that version 1 of the schema wrote are read, and drawn word for word as they were then.

The files in ``version_1`` are those of real runs, each with the report.md that was written beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nbl_export.errors import InputError
from nbl_export.files import write_json
from nbl_export.records import to_json
from nbl_export.report.legacy import from_version_1
from nbl_export.report.legacy_speed import speed_section
from nbl_export.report.plots import report_plots
from nbl_export.report.render import markdown
from nbl_export.report.schema import Report, load_report
from nbl_export.verify.loss.figures import Likeness, MethodLoss
from nbl_export.verify.parity.figures import DecoderParity, EncoderParity, Parity
from tests.engine.conftest import manifest_by_hand

FOLDER = Path(__file__).parent / "version_1"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))


def raw_of(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def upgraded(raw: Any, folder: Path) -> Report:
    write_json(folder / "report.json", raw)
    return load_report(folder / "report.json")


def test_there_are_reports_of_every_kind() -> None:
    assert NAMES == ["classifier", "curve", "encoder", "half"]
    assert {raw_of(name)["schema"] for name in NAMES} == {"nbl-export/report/1"}


@pytest.mark.parametrize("name", NAMES)
def test_a_report_is_drawn_as_it_was(name: str) -> None:
    report = load_report(FOLDER / f"{name}.json")
    drawn, was = (
        markdown(report, report_plots(report)),
        (FOLDER / f"{name}.md").read_text(encoding="utf-8"),
    )
    head, verdict, figures, *rest = drawn.split("\n\n")
    assert verdict.startswith("**PASS** (graph rewrite, parity"), "which is said since"
    assert figures.startswith("| | | |\n| --- | --- | --- |\n| **Attention layers replaced** |"), "and these"
    assert without_speed("\n\n".join([head, *rest])) == without_speed(was)


def without_speed(text: str) -> list[str]:
    """The lines of a report without its section on speed, which has another table since: test_legacy_speed.py."""
    lines, kept = text.splitlines(), []
    inside = False
    for line in lines:
        if line.startswith("#"):
            inside = line.lstrip("# ").startswith("Speed on ONNX Runtime")
        if not inside:
            kept.append(line)
    assert len(kept) > 30
    return kept


@pytest.mark.parametrize("name", NAMES)
def test_written_again_it_is_of_version_2_and_the_same(name: str, tmp_path: Path) -> None:
    report = load_report(FOLDER / f"{name}.json")
    again = upgraded(report.as_json(), tmp_path)
    assert again == report
    raw = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert raw["schema"] == "nbl-export/report/2"
    # What both versions have is the same; version 2 says of more what was not measured.
    for section, value in raw_of(name).items():
        if section not in ("schema", "speed", "engine_speed", "bench"):
            assert_within(value, raw[section], section)


def assert_within(old: Any, new: Any, where: str) -> None:
    """Whatever ``old`` says, ``new`` says too, but for an encoder's figures of a step and a cache."""
    if isinstance(old, dict):
        gone = old.keys() - new.keys()
        assert gone <= {"step", "kv_max_abs", "kv_max_rel", "kv_mean_rel", "kv_worst_layer"}, where
        for key in new.keys() & old.keys():
            assert_within(old[key], new[key], f"{where}.{key}")
    elif isinstance(old, list):
        assert len(old) == len(new), where
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            assert_within(a, b, f"{where}[{i}]")
    else:
        assert old == new, where


def test_sections_are_of_their_types() -> None:
    half, encoder = (load_report(FOLDER / f"{name}.json") for name in ("half", "encoder"))
    assert isinstance(half.parity, DecoderParity) and isinstance(half.method_loss, MethodLoss)
    assert half.parity.pytorch_in_precision is not None and half.graph.precision == "fp16"
    assert half.selection.result is not None and half.selection.result.before_repair is not None
    assert (half.selection.sources, half.selection.seed) == (("tinystories_exllamav2.jsonl.gz",), 0)
    assert half.graph.opset == raw_of("half")["settings"]["export"]["opset"] > 20
    assert isinstance(encoder.parity, EncoderParity) and isinstance(encoder.method_loss, Likeness)
    assert encoder.parity.pytorch_in_precision is not None
    (output,) = (o for o in encoder.parity.outputs if o.output == "sentence_embedding")
    (found,) = (o for o in raw_of("encoder")["parity"]["outputs"] if o["output"] == "sentence_embedding")
    assert (output.width, output.max_rel, output.tokens) == (
        found["width"],
        found["max_rel"],
        found["tokens"],
    )


def test_engines_are_told_apart_by_role(tmp_path: Path) -> None:
    raw = raw_of("half")
    parity = {name: raw["parity"][name] for name in ("prompt_lengths", "steps", "gates")}
    base = {**parity, "prompt_lengths": [1, 2]}
    raw["engines"] = [to_json(manifest_by_hand())]
    for both, linearized in (({**parity, "base": base}, True), ({"base": base}, False)):
        raw["engine_parity"] = both
        found = upgraded(raw, tmp_path)
        assert found.engines == (manifest_by_hand(),)
        assert found.engine_parity is not None and isinstance(found.engine_parity.base, Parity)
        assert found.engine_parity.base.prompt_lengths == (1, 2)
        assert (found.engine_parity.linearized is not None) is linearized
    raw["engine_parity"] = parity
    found = upgraded(raw, tmp_path)
    assert found.engine_parity is not None and found.engine_parity.base is None


def test_what_was_timed_has_the_form_of_today() -> None:
    raw = raw_of("curve")
    found = from_version_1(raw)
    assert found["speed"] == speed_section(raw["speed"]) != raw["speed"]
    assert not found.get("engine_speed") and not found.get("bench")


def test_what_is_not_a_report_is_not_upgraded(tmp_path: Path) -> None:
    for missing in ("settings", "selection", "graph", "parity"):
        raw = raw_of("half")
        del raw[missing]
        with pytest.raises(InputError, match=r"is damaged .*run `nbl-export verify` again"):
            upgraded(raw, tmp_path)
    for name, wrong in (("settings", None), ("selection", []), ("graph", 3), ("engine_parity", 3)):
        with pytest.raises(InputError, match="is damaged"):
            upgraded({**raw_of("half"), name: wrong}, tmp_path)
