"""`nbl-export bench` on real graphs and folders: processes, profiles, files. No time is asserted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.records import from_json
from nbl_export.report.render import write_report
from nbl_export.report.schema import load_bench, load_report
from nbl_export.settings import BenchSettings
from nbl_export.stages.bench import bench_candidates, graphs_against
from nbl_export.verify.speed.race import Harness
from nbl_export.verify.speed.values import CellResult
from tests.families import needs
from tests.finished import resumed
from tests.processes import Notes

# the stage ---------------------------------------------------------------------------------------


QUICK = api.BenchSettings(batches=(1, 2), contexts=(8, 16), rounds=3, most=1, memory=False)


@pytest.mark.usefixtures("stories_model")
def test_a_bench_of_a_real_folder(stories_copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(stories_copy, tmp_path / "other"))
    settings = api.BenchSettings(
        (f"elsewhere={other}", str(other / "baseline")),
        ("eager", "dropped"),
        (1, 2),
        (8, 16),
        3,
        1,
        memory=True,
    )
    value = api.bench(stories_copy, settings)
    names = [
        "base",
        "linearized",
        "dropped",
        "PyTorch eager",
        "elsewhere, base",
        "elsewhere, linearized",
        "baseline",
    ]
    names.append("base again")
    assert [c.name for c in value.speed.candidates] == names
    assert [(c.phase, c.batch, c.context) for c in value.speed.cells] == [
        (phase, batch, context)
        for batch, context in ((1, 8), (2, 8), (1, 16), (2, 16))
        for phase in ("prefill", "decode")
    ]
    for cell in value.speed.cells:
        assert [r.name for r in cell.results] == names and not cell.absent
        pairs = [r.name for r in cell.results if r.over_base]
        assert pairs == ["linearized", "dropped", "elsewhere, linearized"]
        assert [r.name for r in cell.results if not r.peak_bytes] == ["PyTorch eager"]
        # Three rounds, and not one more, say nothing.
        assert not any(r.over_base.resolved for r in cell.results if r.over_base)
        caches = {r.name: r.cache_bytes for r in cell.results}
        rows = cell.batch * cell.context
        assert caches["base"] == 5 * 2 * 4 * rows * 8 * 4 and caches["linearized"] == 3 * 2 * 4 * rows * 8 * 4
    assert value == load_bench(stories_copy / "report" / "bench.json")
    text = (stories_copy / "report" / "bench.md").read_text()
    assert all(name in text for name in names) and "plots/bench.png" in text
    assert (stories_copy / "report" / "plots" / "bench.png").read_bytes()[:4] == b"\x89PNG"
    # The report has it too, and the verification stays done.
    report = load_report(stories_copy / "report" / "report.json")
    assert report.bench == value
    assert "elsewhere, linearized" in (stories_copy / "report" / "report.html").read_text()
    assert "](plots/bench.png)" in (stories_copy / "report" / "report.md").read_text()
    # It is the bench's own: a report without it leaves it.
    write_report(stories_copy / "report", replace(report, bench=None))
    assert (stories_copy / "report" / "plots" / "bench.png").is_file()
    write_report(stories_copy / "report", report)
    before = (stories_copy / "report" / "report.json").stat().st_mtime_ns
    api.verify(stories_copy, api.VerifySettings(contexts=(16,), rounds=3))
    assert (stories_copy / "report" / "report.json").stat().st_mtime_ns == before
    # Another verification of the same graphs keeps it.
    assert api.verify(stories_copy, api.VerifySettings(contexts=(8,), rounds=3)).bench == value


def test_an_interrupted_bench_goes_on(stories_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = Harness.run, []

    def interrupted(self: Harness, cells: Any, listener: Any = None) -> Iterator[list[CellResult]]:
        for both in real(self, cells, listener):
            made.append((both[0].batch, both[0].context))
            yield both
            if len(made) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(Harness, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        api.bench(stories_copy, QUICK)
    assert made == [(1, 8), (2, 8)] and not (stories_copy / "report" / "bench.json").exists()
    partial = stories_copy / "nbl" / "bench.partial.json"
    first = [from_json(CellResult, c, "a cell", "") for c in json.loads(partial.read_text())["cells"]]
    value = api.bench(stories_copy, QUICK)
    assert made[2:] == [(1, 16), (2, 16)] and len(value.speed.cells) == 8
    assert first == list(value.speed.cells[:4])
    assert value.notes == ("4 cells are those of a run that was interrupted, on its own roofline.",)
    assert not partial.exists()


def test_a_report_of_other_graphs_gets_no_bench(stories_copy: Path) -> None:
    api.select(stories_copy, api.SelectSettings(k=1, criterion="cca"))
    api.rewrite(stories_copy)
    api.bench(stories_copy, QUICK)
    assert load_report(stories_copy / "report" / "report.json").bench is None
    # Nor does a report get the bench of other graphs.
    api.select(stories_copy, api.SelectSettings(k=3, criterion="cca"))
    api.rewrite(stories_copy)
    assert api.verify(stories_copy, api.VerifySettings(contexts=(8,), rounds=3)).bench is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (api.BenchSettings(against=("nowhere",)), "there is no nowhere"),
        (api.BenchSettings(contexts=(4096,)), "asks for 4,096 tokens and more, the model has 512 positions"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(
    stories_copy: Path, settings: api.BenchSettings, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        api.bench(stories_copy, settings)
    assert not (stories_copy / "report" / "bench.json").exists()


# bench candidates ----------------------------------------------------------------------------------


def test_an_output_folder_is_both_its_graphs(stories_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        ("x, base", None, stories_out / "baseline" / "model.onnx"),
        ("x, linearized", "x, base", stories_out / "model.onnx"),
    ]
    assert list(graphs_against([f"x={stories_out}"])) == both
    # Without a name it is the folder's, also where that is not written out.
    monkeypatch.chdir(stories_out / "baseline")
    assert list(graphs_against(["."])) == [("baseline", None, Path("model.onnx"))]
    assert [name for name, *_ in graphs_against([str(stories_out)])] == [
        "stories260K, base",
        "stories260K, linearized",
    ]
    # The last sign parts a name from its folder.
    (named,) = graphs_against([f"a=b={stories_out / 'baseline'}"])
    assert named[:2] == ("a=b", None)


def test_graphs_that_cannot_be_told_apart_are_refused(stories_out: Path) -> None:
    baseline = stories_out / "baseline"
    engines = ("base engine", "linearized engine")
    for taken in (
        "base",
        "linearized",
        "base again",
        "dropped",
        "PyTorch eager",
        "torch.compile",
        "llama.cpp Q8_0",
        "openvino fp16, base",
        *engines,
    ):
        for folder in (baseline, stories_out):
            with pytest.raises(
                InputError, match=f"times what it calls '{taken}'; say NAME=DIR with another name"
            ):
                list(graphs_against([f"{taken}={folder}"]))
    with pytest.raises(InputError, match="times what it calls 'base'"):
        next(graphs_against([str(baseline), f"base={baseline}"]))  # before the first is looked at
    with pytest.raises(InputError, match="names 'x, base' twice"):
        list(graphs_against([f"x={stories_out}", f"x={stories_out}"]))
    assert len(list(graphs_against([f"x={stories_out}", f"y={stories_out}", str(baseline)]))) == 5


def test_what_is_not_there_or_not_current_is_refused(stories_copy: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--against x=nowhere: there is no nowhere\."):
        list(graphs_against(["x=nowhere"]))
    for given, lacks in {
        "=x": "name",
        f"={stories_copy}": "name",
        f" ={stories_copy}": "name",
        "/": "name",
        "x=": "folder",
    }.items():
        with pytest.raises(InputError, match=f"--against {given} has no {lacks}: say NAME=DIR."):
            list(graphs_against([given]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        list(graphs_against([str(tmp_path / "empty")]))
    api.select(stories_copy, api.SelectSettings(k=1, criterion="cca"))
    with pytest.raises(InputError, match="run `nbl-export rewrite"):
        list(graphs_against([str(stories_copy)]))


def test_who_takes_part_in_which_order(stories_out: Path, stories_copy: Path) -> None:
    settings = BenchSettings(peer=("dropped", "compile", "eager"))
    against = list(graphs_against([f"x={stories_out}"]))
    with ExitStack() as stack:
        found = list(bench_candidates(resumed(stories_copy), against, settings, stack))
        assert [(c.name, c.base) for c in found] == [
            ("base", None),
            ("linearized", "base"),
            ("dropped", "base"),
            ("PyTorch eager", None),
            ("torch.compile", None),
            ("x, base", None),
            ("x, linearized", "x, base"),
            ("base again", None),
        ]
        costs = {c.name: c.cost for c in found}
        assert costs["base"] == costs["base again"] == costs["x, base"] and costs["PyTorch eager"] is None
        base, linearized, dropped = (costs[name] for name in ("base", "linearized", "dropped"))
        assert base and linearized and dropped
        # Two of five layers keep no cache and, dropped, have no map of 64 x 64 either.
        assert linearized.kv_bytes_per_token * 5 == base.kv_bytes_per_token * 3
        assert linearized.weight_macs - dropped.weight_macs == 2 * 64 * 64
    with ExitStack() as stack:
        plain = list(bench_candidates(resumed(stories_copy), [], BenchSettings(), stack))
    assert [c.name for c in plain] == ["base", "linearized", "base again"]


@needs("gguf")
def test_forms_take_part_each_with_its_own_base(stories_copy: Path) -> None:
    peer, to, precisions, called = "llama.cpp", "gguf", ("fp32", "q8_0"), ("F32", "Q8_0")
    settings = BenchSettings(peer=(peer,), contexts=(16,), batches=(2,), rounds=3, most=1)
    with pytest.raises(
        InputError, match=rf"has none of its plan that passed: run `nbl-export convert .* --to {to}`"
    ):
        api.bench(stories_copy, settings)
    for precision in precisions:
        assert api.convert(stories_copy, api.ConvertSettings(to, precision)).passed  # type: ignore[arg-type]
    files = sorted((stories_copy / to).rglob("*"))
    value = api.bench(stories_copy, settings)
    names = [f"{peer} {one}{base}" for one in called for base in (", base", "")]
    found = {c.name: c.base for c in value.speed.candidates}
    assert list(found) == ["base", "linearized", *names, "base again"]
    assert [found[name] for name in names[1::2]] == names[::2]
    for cell in value.speed.cells:
        assert all(cell.of(name) for name in names) and not cell.absent
    assert sorted((stories_copy / to).rglob("*")) == files, "what was made for the race is gone"
    heard = Notes()
    api.bench(stories_copy, settings, heard)
    assert heard.kept == ["bench"]
    api.select(stories_copy, api.SelectSettings(k=1, criterion="cca"))
    api.rewrite(stories_copy)
    with pytest.raises(InputError, match="has none of its plan that passed"):
        api.bench(stories_copy, settings)
