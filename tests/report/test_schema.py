"""The report as a value and as JSON: nothing is lost, nothing is let through, the verdict is strict."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from nbl_export import __version__
from nbl_export.errors import InputError
from nbl_export.files import write_json
from nbl_export.linearize.plan import load_plan
from nbl_export.models.source import ModelIdentity, find_model
from nbl_export.records import Check, to_json
from nbl_export.report.assemble import (
    assemble,
    keeping,
)
from nbl_export.report.drawing import headlines, model_name
from nbl_export.report.render import license_of, model_card, without_paths, write_bench
from nbl_export.report.schema import BenchReport, Report, environment, load_bench, load_report
from nbl_export.settings import BenchSettings
from nbl_export.verify.case import Measurement
from nbl_export.verify.speed.values import Speed
from nbl_export.workspace import Workspace
from scripts.json_schemas import KINDS, file_of, schema_of


def test_round_trip(report: Report, tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", report.as_json())
    assert load_report(tmp_path / "report.json") == report
    raw = json.loads((tmp_path / "report.json").read_text())
    assert raw["schema"] == Report.SCHEMA == "nbl-export/report/2"
    assert set(raw) == {"schema", "verdict", *(f.name for f in fields(Report))}


def test_reading_a_report_imports_nothing_heavy() -> None:
    """Sections are values of the rooms that measure them, whose libraries a reader does not need."""
    heavy = ("torch", "scipy", "onnx_ir", "onnxruntime", "transformers", "matplotlib")
    code = f"import sys, nbl_export.report.schema; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        (("passed", "skipped"), "passed"),
        (("passed", "failed"), "failed"),
        (("skipped",), "failed"),
        ((), "failed"),
    ],
)
def test_a_verdict_needs_a_check_that_passed_and_none_that_failed(
    report: Report, tmp_path: Path, states: Any, verdict: str
) -> None:
    raw = replace(report, checks=tuple(Check(state, state, "") for state in states)).as_json()
    assert raw["verdict"] == verdict
    # One that was written is not believed.
    write_json(tmp_path / "report.json", raw | {"verdict": "passed"})
    assert load_report(tmp_path / "report.json").verdict == verdict


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "nbl-export/report/1"}, r"is no report of this version \(nbl-export/report/2\)"),
        ({"schema": None}, "is no report of this version"),
        ({"checks": None}, "is damaged"),
        ({"checks": [{"name": "parity"}]}, "is damaged"),
        ({"extra": 1}, "is damaged"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(
    report: Report, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    raw = {name: value for name, value in (report.as_json() | change).items() if value is not None}
    (tmp_path / "report.json").write_text(json.dumps(raw))
    with pytest.raises(
        InputError, match=rf"report\.json {words}.*run `nbl-export verify` again\.$"
    ) as caught:
        load_report(tmp_path / "report.json")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is missing"):
        load_report(tmp_path / "nowhere.json")


# the machine, a bench, the published schemas ---------------------------------------------------------


@pytest.fixture
def bench(engine_speed: Speed) -> BenchReport:
    settings = asdict(BenchSettings(peer=("eager",)))
    settings = {name: list(v) if isinstance(v, tuple) else v for name, v in settings.items()}
    checks = (Check("ceilings", "passed", "fine"), Check("nowhere slower", "skipped", "nothing resolved"))
    model = ModelIdentity("a/model", "folder", None, "0" * 64)
    machine, hashes = environment(), {"rewrite": "0" * 64}
    return BenchReport("now", "1.0", model, machine, settings, hashes, checks, ("a note",), engine_speed)


def test_a_bench_comes_back_from_its_file(bench: BenchReport, report: Report, tmp_path: Path) -> None:
    write_bench(tmp_path, bench)
    assert load_bench(tmp_path / "bench.json") == bench
    (tmp_path / "bench.json").write_text(json.dumps(report.as_json()))
    with pytest.raises(InputError, match=r"is no bench of this version .*run `nbl-export bench` again"):
        load_bench(tmp_path / "bench.json")


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_schema_is_of_what_is_written(kind: Any) -> None:
    published = json.loads(file_of(kind).read_text(encoding="utf-8"))
    assert published == schema_of(kind), "run python scripts/json_schemas.py"
    Draft202012Validator.check_schema(published)


def read(out: Path, name: str) -> Any:
    return json.loads((out / "nbl" / name).read_text())


@pytest.fixture
def assembled(stories_copy: Path, stories_folder: Path) -> Any:
    """Called with what was measured and engines: the report of the finished run."""

    def report(measured: Measurement | None = None, engines: Any = ()) -> Report:
        ws = Workspace.open(stories_copy)
        plan, source = load_plan(ws.plan), find_model(str(stories_folder))
        return assemble(ws, source, plan, {"rounds": 3}, measured or Measurement(), engines)

    return report


def test_it_holds_what_was_recorded(assembled: Any, stories_copy: Path) -> None:
    report = assembled()
    raw = to_json(report)
    state = read(stories_copy, "workspace.json")
    stages = {name: state["stages"][name] for name in ("calibrate", "select", "export", "rewrite")}
    assert raw["settings"] == {**{name: s["settings"] for name, s in stages.items()}, "verify": {"rounds": 3}}
    assert raw["stage_seconds"] == {name: s["seconds"] for name, s in stages.items()}
    files = {name: digest for s in stages.values() for name, digest in s["files"].items()}
    assert raw["hashes"] == {"model": state["model"]["fingerprint"], **files}
    assert raw["notes"] == [note for s in stages.values() for note in s["notes"]]
    candidates = read(stories_copy, "candidates.json")["candidates"]
    assert [(c["layer"], c["cca"], c["kind"]) for c in raw["selection"]["candidates"]] == [
        (c["layer"], c["cca"], c["kind"]) for c in candidates
    ]
    plan = read(stories_copy, "plan.json")
    assert raw["selection"]["criterion"] == plan["criterion"] == "cca" and raw["selection"]["layers"] == [
        2,
        3,
    ]
    summary = read(stories_copy, "rewrite.json")
    assert all(raw["graph"][name] == summary[name] for name in ("before", "after", "kv_layers", "proofs"))
    exported = stages["export"]["settings"]
    assert [raw["graph"][n] for n in ("precision", "kv_cache", "opset", "task")] == [
        exported["precision"],
        exported["kv_cache"],
        exported["opset"],
        None,
    ]
    assert (report.model.hidden_size, report.model.layers, report.tool_version) == (64, 5, __version__)
    assert raw["model"]["fingerprint"] == state["model"]["fingerprint"] and "path" not in raw["model"]


def test_it_holds_what_was_measured(assembled: Any, report: Report) -> None:
    bare = assembled()
    assert (bare.parity, bare.method_loss, bare.speed, bare.engines, bare.bench) == (None,) * 5
    assert [c.name for c in bare.checks] == ["graph rewrite"] and bare.passed
    measured = Measurement(
        parity=report.parity,
        divergence="layer 1",
        method_loss=report.method_loss,
        speed=report.speed,
        checks=(Check("parity", "failed", "far"),),
        notes=("measured",),
    )
    found = assembled(measured)
    assert (found.parity, found.method_loss, found.speed) == (report.parity, report.method_loss, report.speed)
    assert found.divergence == "layer 1" and found.notes == (*bare.notes, "measured")
    # The rewrite's verdict comes first, and does not hide another's.
    assert [(c.name, c.status) for c in found.checks] == [("graph rewrite", "passed"), ("parity", "failed")]
    assert found.checks[0].detail.startswith("2 attention layers and KV pairs gone") and not found.passed


@pytest.mark.parametrize(
    ("name", "command"),
    [("rewrite.json", "rewrite"), ("candidates.json", "select"), ("export.json", "export")],
)
def test_a_record_that_is_damaged_names_the_command(
    assembled: Any, stories_copy: Path, name: str, command: str
) -> None:
    (stories_copy / "nbl" / name).write_text('{"more": 1}')
    with pytest.raises(InputError, match=rf"run `nbl-export {command}` again\.$"):
        assembled()
    (stories_copy / "nbl" / name).unlink()
    with pytest.raises(InputError, match=rf"is missing.*run `nbl-export {command}` again\.$"):
        assembled()


# what an earlier verification measured --------------------------------------------------------------

GRAPHS, ENGINES = ("model.onnx", "nbl/plan.json"), ("engine/model.engine",)
LATER = "2027-01-02T03:04:05+00:00"


@pytest.fixture
def earlier(full: Report) -> Report:
    """With a bound that was asked for and not kept."""
    checks = (*full.checks, Check("KL bound", "failed", "KL 0.4 on held-out text, above the 0.1 asked for"))
    settings = {**full.settings, "verify": {"rounds": 9, "contexts": [16], "bound": {"max_kl": 0.1}}}
    return replace(
        full, checks=checks, settings=settings, hashes={**full.hashes, ENGINES[0]: "e"}, created="2026-01-01"
    )


@pytest.fixture
def later(earlier: Report) -> Report:
    """The same graphs, neither loss nor speed measured, the engines not run."""
    checks = (
        *(c for c in earlier.checks if c.name in ("graph rewrite", "parity")),
        Check("method loss", "skipped", "--no-quality"),
        Check("speed", "skipped", "--no-speed"),
        Check("engine run", "skipped", "not run: no NVIDIA GPU"),
    )
    settings = {**earlier.settings, "verify": {"quality": False}}
    return replace(
        earlier,
        created=LATER,
        checks=checks,
        settings=settings,
        method_loss=None,
        speed=None,
        engine_parity=None,
        engine_speed=None,
    )


def kept(later: Report, earlier: Report | None) -> Report:
    return keeping(later, earlier, GRAPHS, ENGINES)


def test_sections_keep_their_date_their_settings_and_their_verdict(later: Report, earlier: Report) -> None:
    found = kept(later, earlier)
    assert (found.method_loss, found.speed) == (earlier.method_loss, earlier.speed)
    assert found.engine_speed == earlier.engine_speed
    assert set(found.kept) >= {"method_loss", "speed", "engine_speed"}
    assert {k.created for k in found.kept.values()} == {"2026-01-01"}
    assert found.kept["speed"].settings == earlier.settings["verify"]
    checks = {c.name: c for c in found.checks}
    # A gate that failed has failed still.
    assert not found.passed and checks["KL bound"].status == "failed"
    assert checks["KL bound"].detail.endswith("asked for (measured 2026-01-01)")
    assert checks["speed"].status == "passed"
    assert checks["speed"].detail.endswith("(measured 2026-01-01, now --no-speed)")
    assert checks["method loss"].status == "skipped"
    assert checks["method loss"].detail == "--no-quality; what is shown was measured 2026-01-01"
    assert len(checks) == len(found.checks)
    assert (found.created, found.settings) == (later.created, later.settings)


@pytest.mark.parametrize("name", GRAPHS)
def test_of_other_graphs_nothing_is_kept(later: Report, earlier: Report, name: str) -> None:
    assert kept(replace(later, hashes={**later.hashes, name: "0" * 64}), earlier).kept == {}
    without = {n: d for n, d in earlier.hashes.items() if n != name}
    assert kept(later, replace(earlier, hashes=without)) == later
    assert kept(later, None) == later
    assert keeping(later, earlier, (), ()) == later


def test_of_other_engines_only_what_the_graphs_gave_is_kept(later: Report, earlier: Report) -> None:
    other = replace(later, hashes={**later.hashes, ENGINES[0]: "f"})
    assert set(kept(other, earlier).kept) == {"method_loss", "speed"}
    assert set(keeping(later, earlier, GRAPHS, ()).kept) == {"method_loss", "speed"}
    # What failed to run now has no parity of before.
    for name in ("engine run", "engine parity"):
        failed = replace(later, checks=(*later.checks[:-1], Check(name, "failed", "does not load")))
        assert set(kept(failed, earlier).kept) == {"method_loss", "speed"}


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
    assert public.settings["calibrate"]["calibration"] == list(public.selection.sources)
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
