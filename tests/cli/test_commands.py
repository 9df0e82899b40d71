"""`--trt` and `build` through the real command line, with the library that needs no GPU."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import NblError
from nbl_export.models.tasks import task_named
from nbl_export.packages import pip_line
from tests.command_line import (
    assert_refused,
    nbl,
    no_leftovers,
)

TEXT = ["--samples", "32", "--seq-len", "128", "--heldout-samples", "8"]
FAST = ["--decode-steps", "2", "--contexts", "8", "--rounds", "3", "--no-quality"]


@pytest.fixture(scope="session")
def place(stories_folder: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `out`: K = 2, `--trt` as the last word, no GPU."""
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install 'nbl-export[rtx]'")
    from nbl_export.engine.library import find_gpu

    if find_gpu() is not None:
        pytest.skip("is about machines without a GPU")
    folder = tmp_path_factory.mktemp("place")
    done = nbl(stories_folder, *arguments(stories_text), "--k", 2, "--trt", cwd=folder)
    assert done.code == 0, done
    (folder / "first.txt").write_text(done.out)
    return folder


def arguments(text: Path) -> list[object]:
    # Two neighbouring layers: in a model of 1 MB, code for others may outweigh the weights that are gone.
    return ["-o", "out", "--calibration", text, "--criterion", "cca", *TEXT, *FAST]


def engines(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (out / "engine").iterdir()}


def manifest(out: Path, name: str = "model") -> Any:
    return json.loads((out / "engine" / f"{name}.json").read_text())


def stage(out: Path, name: str) -> Any:
    return json.loads((out / "nbl" / "workspace.json").read_text())["stages"].get(name)


# what was asked for ------------------------------------------------------------------------------


class Asked(NblError):
    """Carries what the command line calls the Python API with."""


@pytest.mark.parametrize(
    ("words", "library", "export"),
    [
        (["--k", "2", "--trt"], "auto", ("fp16", "static")),
        (["--trt", "--k", "2"], "auto", ("fp16", "static")),
        (["--trt", "auto", "--k", "2"], "auto", ("fp16", "static")),
        (["--trt", "rtx", "--k", "2"], "rtx", ("fp16", "static")),
        (["--trt=tensorrt", "--k", "2"], "tensorrt", ("fp16", "static")),
        (["--k", "2", "--trt", "--precision", "bf16"], "auto", ("bf16", "static")),
        (["--k", "2", "--trt", "--kv-cache", "concat"], "auto", ("fp16", "concat")),
        (["--k", "2", "--precision", "fp32", "--kv-cache", "concat", "--trt"], "auto", ("fp32", "concat")),
        (["--k", "2"], None, ("fp32", "concat")),
        (["--k", "2", "--precision", "fp16"], None, ("fp16", "concat")),
        (["--k", "2", "--max-batch", "8"], None, ("fp32", "concat")),
    ],
)
@pytest.mark.parametrize("verb", [[], ["run"]])
def test_trt_may_stand_anywhere_and_decides_what_is_exported(
    monkeypatch: pytest.MonkeyPatch, verb: list[str], words: list[str], library: str | None, export: Any
) -> None:
    from nbl_export import cli

    calls = []

    def run(*given: Any, **_: Any) -> None:
        calls.append(given)
        raise Asked

    monkeypatch.setattr(api, "run", run)
    monkeypatch.setattr(sys, "argv", ["nbl-export", *verb, "rtx-model", *words])
    with pytest.raises(SystemExit):
        cli.main()
    ((model, _, selection, *_, exporting, wanted),) = calls
    assert (model, selection.k) == ("rtx-model", 2)
    exporting = exporting.resolve(task_named("text-generation"), wanted is not None)
    assert (exporting.precision, exporting.kv_cache) == export
    assert (wanted.library if wanted else None) == library


# a run with --trt --------------------------------------------------------------------------------


def test_a_run_with_trt_builds_and_reports(place: Path) -> None:
    out = place / "out"
    text = (place / "first.txt").read_text()
    assert "Engines: tensorrt-rtx" in text and "fp16, static cache" in text
    assert re.search(r"PASS  \(graph rewrite, .*\n +2 of 5 attention layers", text, re.S)
    settings = stage(out, "export")["settings"]
    assert (settings["precision"], settings["kv_cache"], settings["opset"]) == ("fp16", "static", 24)
    for name, attention in (("baseline", 5), ("model", 3)):
        found = manifest(out, name)
        assert found["network"]["attention"] == attention
        assert (found["precision"], found["kv_cache"]) == ("fp16", "static")
        assert found["limits"] == {"max_batch": 4, "max_seq": 512, "max_context": 512}  # it has 512 positions
    recorded = stage(out, "build")
    kinds = ("{}.engine", "{}.json", "{}.trtexec.sh", "{}_rows.py")
    assert set(recorded["files"]) == {
        "model.fixed.onnx",
        "baseline/model.fixed.onnx",
        *(f"engine/{kind.format(n)}" for n in ("baseline", "model") for kind in kinds),
    }
    # onnxruntime-genai does not know this form of the cache.
    assert not list(out.rglob("genai_config.json"))
    no_leftovers(out)


# build -------------------------------------------------------------------------------------------


REFUSED = {
    "unknown library": (["--trt", "foo"], 2, ("foo",)),
    "no GPU for tensorrt": (
        ["--trt", "tensorrt"],
        3,
        ("no NVIDIA GPU", "--trt rtx", pip_line("rtx")),
    ),
    "unknown capability": (["--sm", "90"], 2, ("--sm '90'", "SM86")),
    "empty capability": (["--sm", "86,"], 2, ("--sm is empty",)),
    "context beyond the model": (["--max-context", "513"], 2, ("--max-context is 513", "512 positions")),
    "prefill beyond the context": (
        ["--max-seq", "65", "--max-context", "64"],
        2,
        ("--max-seq is 65", "(64)"),
    ),
    "no batch": (["--max-batch", "0"], 2, ("--max-batch is 0",)),
    "context is no number": (["--max-context", "many"], 2, ("--max-context", "--help")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_builds_are_refused_in_one_sentence(place: Path, name: str) -> None:
    options, code, words = REFUSED[name]
    before = engines(place / "out")
    assert_refused(nbl("build", "out", *options, cwd=place), code, *words)
    assert engines(place / "out") == before


def test_doctor_says_whether_the_main_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = nbl("doctor", cwd=tmp_path)
    assert done.code == 0, done
    assert done.out.splitlines()[-1] == "The main job runs here." and str(tmp_path) in done.out
    (tmp_path / "numpy.py").write_text("raise ImportError('libblas.so.3 is not there')")
    monkeypatch.syspath_prepend(str(tmp_path))
    done = nbl("doctor", cwd=tmp_path)
    assert done.code == 3 and "Traceback" not in done.err, done
    assert done.out.splitlines()[-1] == "The main job does not run here."
    assert re.search(r"^numpy .*libblas\.so\.3 is not there", done.out, re.M)
    assert_refused(nbl("doctor", "here", cwd=tmp_path), 2, "more than this command takes")
