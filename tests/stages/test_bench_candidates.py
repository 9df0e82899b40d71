"""Who takes part in a bench: what `--against` names, whose base is whose, and what is refused."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.settings import BenchSettings
from nbl_export.stages.bench_candidates import Against, bench_candidates, graphs_against
from nbl_export.stages.forms import Gguf
from nbl_export.stages.run import Run
from tests.converting import needs
from tests.listening import Notes


@pytest.fixture
def own(stories_copy: Path) -> Path:
    return stories_copy


def test_a_gpu_that_is_not_there(own: Path) -> None:
    with pytest.raises(api.NblError, match="--device cuda needs onnxruntime with CUDA"):
        api.bench(own, api.BenchSettings(device="cuda"))


def test_an_output_folder_is_both_its_graphs(stories_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [
        Against("x, base", None, stories_out / "baseline" / "model.onnx"),
        Against("x, linearized", "x, base", stories_out / "model.onnx"),
    ]
    assert list(graphs_against([f"x={stories_out}"])) == both
    # Without a name it is the folder's, also where that is not written out.
    monkeypatch.chdir(stories_out / "baseline")
    assert list(graphs_against(["."])) == [Against("baseline", None, Path("model.onnx"))]
    assert [a.name for a in graphs_against([str(stories_out)])] == [
        "stories260K, base",
        "stories260K, linearized",
    ]
    # The last sign parts a name from its folder.
    (named,) = graphs_against([f"a=b={stories_out / 'baseline'}"])
    assert (named.name, named.base) == ("a=b", None)


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


def test_what_is_not_there_or_not_current_is_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--against x=nowhere: there is no nowhere\."):
        list(graphs_against(["x=nowhere"]))
    for given, lacks in {
        "=x": "name",
        f"={own}": "name",
        f" ={own}": "name",
        "/": "name",
        "x=": "folder",
    }.items():
        with pytest.raises(InputError, match=f"--against {given} has no {lacks}: say NAME=DIR."):
            list(graphs_against([given]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        list(graphs_against([str(tmp_path / "empty")]))
    api.select(own, api.SelectSettings(k=1, criterion="cca"))
    with pytest.raises(InputError, match="run `nbl-export rewrite"):
        list(graphs_against([str(own)]))


def test_who_takes_part_in_which_order(stories_out: Path, own: Path) -> None:
    settings = BenchSettings(peers=("dropped", "compile", "eager"))
    against = list(graphs_against([f"x={stories_out}"]))
    with ExitStack() as stack:
        found = bench_candidates(Run.resume(own), against, settings, stack)
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
        plain = bench_candidates(Run.resume(own), [], BenchSettings(), stack)
    assert [c.name for c in plain] == ["base", "linearized", "base again"]


@needs(Gguf)
def test_forms_take_part_each_with_its_own_base(own: Path) -> None:
    peer, to, precisions, called = "llama.cpp", "gguf", ("fp32", "q8_0"), ("F32", "Q8_0")
    settings = BenchSettings(peers=(peer,), contexts=(16,), batches=(2,), rounds=3, seconds=5.0)
    with pytest.raises(
        InputError, match=rf"has none of its plan that passed: run `nbl-export convert .* --to {to}`"
    ):
        api.bench(own, settings)
    for precision in precisions:
        assert api.convert(own, api.ConvertSettings(to, precision)).passed  # type: ignore[arg-type]
    files = sorted((own / to).rglob("*"))
    value = api.bench(own, settings)
    names = [f"{peer} {one}{base}" for one in called for base in (", base", "")]
    found = {c.name: c.base for c in value.speed.candidates}
    assert list(found) == ["base", "linearized", *names, "base again"]
    assert [found[name] for name in names[1::2]] == names[::2]
    for cell in value.speed.cells:
        assert all(cell.of(name) for name in names) and not cell.absent
    assert sorted((own / to).rglob("*")) == files, "what was made for the race is gone"
    heard = Notes()
    api.bench(own, settings, heard)
    assert heard.kept == ["bench"]
    api.select(own, api.SelectSettings(k=1, criterion="cca"))
    api.rewrite(own)
    with pytest.raises(InputError, match="has none of its plan that passed"):
        api.bench(own, settings)
