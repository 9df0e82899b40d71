"""The stage that exports: what is kept, what is made again, and the files that consumers find beside the graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from transformers import AutoConfig, AutoTokenizer

from nbl_export import api
from nbl_export.models.source import find_model
from nbl_export.models.tasks import task_named
from nbl_export.stages.export import export, not_given
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


def test_what_a_graph_of_embeddings_is_not_given_is_said(wrapper: Callable[[str], Calibrated]) -> None:
    assert "(deepstack), for which the graph has no inputs" in not_given(wrapper("qwen3-vl").model)
    assert not_given(wrapper("qwen2.5-vl").model) == ""
