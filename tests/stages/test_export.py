"""The stage that exports: what is kept, what is made again, and the files that consumers find beside the graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from transformers import AutoConfig, AutoTokenizer

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.export import checks
from nbl_export.models.source import find_model
from nbl_export.models.tasks import task_named
from nbl_export.stages.export import check_model, export, not_given
from nbl_export.stages.run import Run
from nbl_export.workspace import Workspace
from tests.families import Calibrated
from tests.listening import Notes

CONCAT = api.ExportSettings("fp32", "concat")


@pytest.fixture(scope="module")
def out(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny model was exported; read only."""
    folder = tmp_path_factory.mktemp("exported") / "out"
    export(Run.start(find_model(str(tiny_folder)), folder), CONCAT)
    return folder


def test_consumers_find_the_model_and_its_tokenizer_beside_it(out: Path, tiny_folder: Path) -> None:
    beside = out / "baseline"
    ours, theirs = AutoConfig.from_pretrained(beside), AutoConfig.from_pretrained(tiny_folder)
    assert ours.model_type == "llama" and ours.num_hidden_layers == theirs.num_hidden_layers
    words = "Once upon a time, ünusual words"
    tokens = [AutoTokenizer.from_pretrained(f)(words)["input_ids"] for f in (beside, tiny_folder)]
    assert tokens[0] == tokens[1]
    decoder = json.loads((beside / "genai_config.json").read_text())["model"]["decoder"]
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (4, 2, 8)
    record = Workspace.open(out).record("export")
    assert record is not None
    written = {f"baseline/{p.name}" for p in beside.iterdir()}
    assert set(record.files) == {*written, "nbl/export.json"}, "all of it is recorded, nothing is left over"
    assert json.loads((out / "nbl" / "export.json").read_text()) == {"kept_float32": [], "copies": []}


def test_an_export_is_kept_whoever_would_run_the_exporter(out: Path) -> None:
    listener = Notes()
    export(Run.resume(out, listener), CONCAT)
    export(
        Run.resume(out, listener), api.ExportSettings("fp32", "concat", python="/usr/bin/python-of-another")
    )
    # Without a form, it is the one that suits a decoder.
    export(Run.resume(out, listener), api.ExportSettings().resolve(task_named("text-generation")))
    assert listener.kept == ["export"] * 3 and listener.tasks == []


def test_another_form_replaces_it_and_what_it_does_not_have_is_gone(out: Path, tmp_path: Path) -> None:
    out, listener = Path(shutil.copytree(out, tmp_path / "out")), Notes()
    assert (out / "baseline" / "genai_config.json").exists()
    export(Run.resume(out, listener), api.ExportSettings("bf16", "static"))
    assert listener.kept == []
    # onnxruntime-genai cannot run a static cache; a configuration for it would be of the graph before.
    assert not (out / "baseline" / "genai_config.json").exists()
    proto = onnx.load(str(out / "baseline" / "model.onnx"), load_external_data=False)
    kinds = {i.name: i.type.tensor_type.elem_type for i in proto.graph.input}
    assert kinds["write_indices"] == onnx.TensorProto.INT64
    assert kinds["past_key_values.0.key"] == onnx.TensorProto.BFLOAT16
    record = Workspace.open(out).record("export")
    assert record is not None and (record.settings["precision"], record.settings["kv_cache"]) == (
        "bf16",
        "static",
    )
    assert "python" not in record.settings


def test_a_run_checks_a_form_once(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    plain = checks.check_form

    def counted(model: Any, form: Any, listener: Any) -> Any:
        checked.append(form.name)
        return plain(model, form, listener)

    monkeypatch.setattr(checks, "check_form", counted)
    notes = Notes()
    run = Run.start(find_model(str(tiny_folder)), tmp_path / "out", notes)
    check_model(run, CONCAT)
    assert [(title, total) for title, total, *_ in notes.tasks] == [
        ("Loading tiny", 1),
        ("Running a short text", 1),
        ("Checking the export", 4),
        ("Tracing a few blocks", 1),
    ]
    assert notes.advanced == [1] * 7
    export(run, CONCAT)
    assert checked == ["concat"]
    for form in ("none", "concat"):
        check_model(run, replace(CONCAT, kv_cache=form))
    assert checked == ["concat", "none", "concat"]
    # What was refused is refused again.
    monkeypatch.setattr(checks, "_error", lambda *_: 1.0)
    for _ in range(2):
        with pytest.raises(InputError, match="computes other logits with --kv-cache static"):
            check_model(run, replace(CONCAT, kv_cache="static"))


def test_what_a_graph_of_embeddings_is_not_given_is_said(wrapper: Callable[[str], Calibrated]) -> None:
    assert "(deepstack), for which the graph has no inputs" in not_given(wrapper("qwen3-vl").model)
    assert not_given(wrapper("qwen2.5-vl").model) == ""
