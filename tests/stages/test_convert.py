"""`convert` on a real model: what is written, kept, made again, proven, and skipped where llama.cpp is not here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export import api
from nbl_export.cli import main
from nbl_export.errors import MissingDependencyError
from nbl_export.linearize.plan import LinearLayer, load_plan
from nbl_export.linearize.swap import linearized
from nbl_export.packages import part
from nbl_export.report.schema import load_report
from nbl_export.settings.graphs import PRECISIONS
from nbl_export.stages.convert import FORMS, place_of
from nbl_export.stages.inspection import inspect
from nbl_export.workspace import Workspace
from tests.conftest import exhaustive
from tests.families import needs
from tests.processes import Notes

here = needs("gguf")


def away() -> None:
    raise MissingDependencyError("away")


@pytest.fixture(scope="module")
def converted(stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run with a GGUF file in float32."""
    out = tmp_path_factory.mktemp("converted") / "out"
    shutil.copytree(stories_out, out, copy_function=shutil.copy2)
    value = api.convert(out, api.ConvertSettings(precision="fp32"))
    assert value.passed and value.file == "gguf/model-F32.gguf"
    return out


@here
def test_a_file_is_proven_and_kept(converted: Path) -> None:
    heard = Notes()
    value = api.convert(converted, api.ConvertSettings(precision="fp32"), heard)
    assert heard.kept == ["convert gguf fp32"]
    names = ("linear layers", "parity", "tokens", "KV cache")
    assert {c.name: c.status for c in value.checks} == dict.fromkeys(names, "passed")
    plan = load_plan(converted / "nbl" / "plan.json")
    assert value.layers == tuple(map(str, plan.blocks)) and value.parity is not None
    assert value.parity.worst <= 1e-3 and len(value.parity.steps) == 9
    (shown,) = api.inspect(converted / value.file)
    facts = dict(shown.rows)
    assert facts["architecture"] == "deci" and facts["blocks whose attention is one matrix"] == str(
        len(plan.blocks)
    )
    assert value.bytes == (converted / value.file).stat().st_size


@here
@pytest.mark.parametrize(
    "precision",
    [pytest.param("fp16", marks=exhaustive), pytest.param("q8_0", marks=exhaustive), "q4_k_m"],
)
def test_another_precision_is_beside_it(converted: Path, tmp_path: Path, precision: Any) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out", copy_function=shutil.copy2))
    value = api.convert(out, api.ConvertSettings(precision=precision))
    assert value.passed, value.checks
    names = {path.name for path in (out / "gguf").iterdir()}
    assert names == {"model-F32.gguf", Path(value.file).name}
    heard = Notes()
    api.convert(out, api.ConvertSettings(precision="fp32"), heard)
    assert heard.kept == ["convert gguf fp32"], "the other stays as it is"
    stages, *_, forms = inspect(out)
    rows = {row[0]: row[1] for row in stages.rows}
    assert rows["convert gguf fp32"] == rows[f"convert gguf {precision}"] == "done" and "convert" not in rows
    assert forms.title == "Other engines"
    assert {(row[0], row[4]) for row in forms.rows} == {
        (f"gguf {p}", check)
        for p in ("fp32", precision)
        for check in ("linear layers", "parity", "tokens", "KV cache")
    }
    assert {row[5] for row in forms.rows} == {"passed"}
    in_report = load_report(out / "report" / "report.json").forms
    assert list(in_report) == ["gguf fp32", f"gguf {precision}"] and in_report[f"gguf {precision}"] == value
    assert value.file in (out / "report" / "report.html").read_text()
    api.verify(out, api.VerifySettings(speed=False, decode_steps=2))
    assert load_report(out / "report" / "report.json").forms == in_report, "a later verification keeps them"
    api.select(out, api.SelectSettings(k=1, criterion="cca"))
    api.rewrite(out)
    assert not api.verify(out, api.VerifySettings(speed=False, decode_steps=2)).forms, (
        "they are of another plan"
    )
    assert value.bytes < (converted / "gguf" / "model-F32.gguf").stat().st_size


@here
@pytest.mark.parametrize("change", ["scaled W", "no bias"])
def test_a_wrong_file_fails_and_the_exit_code_says_so(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out = Path(shutil.copytree(converted, tmp_path / "out", copy_function=shutil.copy2))
    real = FORMS["gguf"].write

    def wrong(model, place, plan, precision, listener):  # type: ignore[no-untyped-def]
        layers = {
            i: LinearLayer(one.w * np.float32(1.05), one.b)
            if change == "scaled W"
            else LinearLayer(one.w, 0 * one.b)
            for i, one in plan.layers.items()
        }
        return real(model, place, replace(plan, layers=layers), precision, listener)

    monkeypatch.setitem(FORMS, "gguf", replace(FORMS["gguf"], write=wrong))
    monkeypatch.setattr("sys.argv", ["nbl-export", "convert", str(out), "--precision", "q8_0", "--quiet"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    checks = json.loads((out / "nbl" / "conversion.gguf.q8_0.json").read_text())["checks"]
    assert {c["name"]: c["status"] for c in checks}["linear layers"] == "failed"


def test_without_llama_cpp_the_file_is_written_and_the_check_says_what_to_install(
    stories_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMS, "gguf", replace(FORMS["gguf"], require=away))
    value = api.convert(stories_copy, api.ConvertSettings(precision="fp32"))
    stored, check = value.checks
    assert (
        stored.status == "passed"
        and check.status == "skipped"
        and "llama.cpp is not here: pip install" in check.detail
        and value.passed
    )
    assert (stories_copy / value.file).is_file()


@needs("mlx")
def test_a_folder_for_mlx_is_proven_with_its_cache(stories_copy: Path) -> None:
    value = api.convert(stories_copy, api.ConvertSettings("mlx", "fp32"))
    assert value.passed and value.file == "mlx/fp32" and value.parity is not None
    names = {path.name for path in (stories_copy / "mlx" / "fp32").iterdir()}
    assert {
        "config.json",
        "tokenizer.json",
        "model-00001.safetensors",
        "model.safetensors.index.json",
    } <= names
    assert all(step.kv_max_rel > 0 for step in value.parity.steps)  # keys and values were compared


def test_a_folder_for_transformers_is_proven_and_scored_by_lm_eval(
    stories_copy: Path, stories_model: Any, tmp_path: Path
) -> None:
    value = api.convert(stories_copy, api.ConvertSettings("hf", "fp32"))
    assert value.passed and value.file == "hf/fp32" and value.parity is not None
    assert value.parity.worst <= 1e-3
    assert all(step.kv_max_rel > 0 for step in value.parity.steps)  # keys and values were compared
    names = {path.name for path in (stories_copy / "hf" / "fp32").iterdir()}
    assert {"config.json", "tokenizer.json", "modeling_nbl.py", "generation_config.json"} <= names
    facts = dict(api.inspect(stories_copy / value.file)[0].rows)
    assert facts["model type"] == "nbl_llama" and facts["dtype"] == "float32"
    assert [path.split(".")[2] for path in facts["linear or dropped"].split(", ")] == list(value.layers)

    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install '.[eval]'")
    context, continuation = "Once upon a time, there was a little", " girl who had a red ball."
    # In a process of its own, as a user has it: what lm-eval sets up stays in a process.
    code = (
        "import json, sys\n"
        "from lm_eval.api.instance import Instance\n"
        "from lm_eval.models.huggingface import HFLM\n"
        "lm = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device='cpu', dtype='float32')\n"
        "((score, _),) = lm.loglikelihood([Instance('loglikelihood', {}, tuple(sys.argv[2:]), 0)])\n"
        "print(json.dumps([score, lm.tok_encode(sys.argv[2] + sys.argv[3]), lm.tok_encode(sys.argv[2])]))\n"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(stories_copy / "hf" / "fp32"), context, continuation],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found, whole, begun = json.loads(done.stdout.splitlines()[-1])
    ids = torch.tensor([whole])
    with torch.inference_mode(), linearized(stories_model, load_plan(stories_copy / "nbl" / "plan.json")):
        scores = stories_model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    places = range(len(begun), len(whole))
    assert found == pytest.approx(sum(float(scores[i - 1, whole[i]]) for i in places), abs=1e-3)


def test_what_llama_cpp_must_quantize_is_refused_without_it_before_any_work(
    stories_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llama_cpp_py_sync", "llama_cpp_py_sync._cffi_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    before, heard = sorted(stories_copy.rglob("*")), Notes()
    with pytest.raises(
        MissingDependencyError, match="--precision q4_k_m needs llama-cpp-py-sync: pip install"
    ):
        api.convert(stories_copy, api.ConvertSettings(precision="q4_k_m"), heard)
    assert sorted(stories_copy.rglob("*")) == before and not heard.tasks


@needs("decilm")
def test_a_folder_for_decilm_says_what_leaving_b_out_costs(stories_copy: Path) -> None:
    value = api.convert(stories_copy, api.ConvertSettings("decilm", "fp32"))
    assert value.passed and value.file == "decilm/fp32" and value.parity is not None, value.checks
    parity, cost = value.checks
    assert (parity.name, parity.status, cost.name) == ("parity", "passed", "without b")
    ratio, with_b = (float(text) for text in re.findall(r"(?:ratio|with b) ([\d.]+)", cost.detail))
    report = load_report(stories_copy / "report" / "report.json")
    assert with_b == pytest.approx(report.method_loss.perplexity_ratio, abs=1e-4)  # type: ignore[union-attr]
    assert with_b < ratio < 1.5 * with_b, "it costs something, and not much"
    assert list(report.forms) == ["decilm fp32"]


@needs("openvino")
def test_a_folder_for_openvino_is_proven_with_its_cache_and_its_tokens(stories_copy: Path) -> None:
    value = api.convert(stories_copy, api.ConvertSettings("openvino", "fp16"))
    assert value.passed and value.file == "openvino/fp16" and value.parity is not None, value.checks
    assert {c.name: c.status for c in value.checks} == {"parity": "passed", "tokens": "passed"}
    assert all(step.kv_max_rel > 0 for step in value.parity.steps)  # keys and values were compared
    names = {path.name for path in (stories_copy / "openvino" / "fp16").iterdir()}
    models = ("openvino_model", "openvino_tokenizer", "openvino_detokenizer")
    assert names >= {"config.json", *(f"{m}.{end}" for m in models for end in ("xml", "bin"))}
    assert dict(api.inspect(stories_copy / value.file)[0].rows)["files of weights"].startswith("1, ")
    assert not [name for name in names if name.startswith(".")]


# forms ---------------------------------------------------------------------------------------------

CASES = [(to, precision) for to, precisions in PRECISIONS.items() for precision in precisions]


def test_no_two_are_in_one_place(stories_out: Path) -> None:
    places = [place_of(Workspace.open(stories_out), *case) for case in CASES]
    assert len(set(places)) == len(CASES) and all(stories_out in place.parents for place in places)


@pytest.mark.parametrize("to", FORMS)
def test_an_engine_that_is_not_here(to: str, stories_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = replace(FORMS[to], require=away)
    monkeypatch.setitem(FORMS, to, form)
    assert part(form.package).use and not form.is_here()
    if form.needed(precision := PRECISIONS[to][-1]):
        said = f"--to {to} --precision {precision} needs {form.package}: pip install"
        with pytest.raises(MissingDependencyError, match=said):
            api.convert(stories_copy, api.ConvertSettings(to, precision))  # type: ignore[arg-type]
