"""A graph that is kept is the one that is traced, and it is for nothing else than what it was traced of."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.export import torch as exporting
from nbl_export.export.embeds import reading_embeds
from nbl_export.export.forms import FORMS, STATIC, encoder_form
from nbl_export.graph.io import save_graph
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.tasks import Pooling, task_named
from nbl_export.models.weights import resident
from nbl_export.settings.graphs import ExportSettings
from nbl_export.stages.export import _of_opset
from tests import kept, replaced, traced_once
from tests.encoders import text_encoder
from tests.tiny_types import tiny_model
from tests.traced_once import key_of

CONCAT = FORMS["concat"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", num_hidden_layers=1)


def written(graph: Any, folder: Path) -> list[bytes]:
    folder.mkdir()
    return [path.read_bytes() for path in save_graph(graph, folder / "model.onnx")]


def test_it_is_kept_byte_for_byte(model: Any, tmp_path: Path) -> None:
    calls, plain = [], traced_once._trace

    def counted(*given: Any) -> Any:
        calls.append(given)
        return plain(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replaced, "HARMLESS", (*replaced.HARMLESS, replaced, kept, traced_once))
        patch.setattr(kept, "_folder", [tmp_path])
        patch.setattr(traced_once, "_trace", counted)
        first = written(exporting.trace(model), tmp_path / "first")
        assert written(exporting.trace(copy.deepcopy(model)), tmp_path / "second") == first
        assert len(calls) == 1


def test_the_exporters_own_tests_trace(model: Any, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replaced, "HARMLESS", (*replaced.HARMLESS, replaced, kept, traced_once))
        patch.setattr(kept, "_folder", [tmp_path])
        assert traced_once._kept(model, CONCAT, ".onnx") is not None
        for test in ("export/test_torch.py::test", "test_families.py::test_graph[llama]"):
            patch.setenv("PYTEST_CURRENT_TEST", f"tests/{test} (call)")
            assert traced_once._kept(model, CONCAT, ".onnx") is None


def scaled(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] *= 1 + 1e-6


def tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def untied(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.clone(), requires_grad=False)


def half(model: Any) -> None:
    model.half()


def config(model: Any) -> None:
    model.config.rms_norm_eps = 1e-4


def attribute(model: Any) -> None:
    model.model.norm.variance_epsilon = 1e-4


def buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 2


def other_class(model: Any) -> None:
    model.model.norm = torch.nn.Identity()


def attention(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    "change",
    [scaled, tied, untied, half, config, attribute, buffer, other_class, attention],
    ids=lambda f: f.__name__,
)
def test_another_model_is_another(model: Any, change: Any) -> None:
    other = copy.deepcopy(model)
    assert key_of(other, CONCAT) == key_of(model, CONCAT) is not None
    change(other)
    assert key_of(other, CONCAT) not in (key_of(model, CONCAT), None)


def test_equal_weights_that_are_tied_are_another_model(model: Any) -> None:
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    tied(one)
    untied(other)
    assert key_of(one, CONCAT) != key_of(other, CONCAT)


def test_each_form_is_another() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    assert len({key_of(model, form) for form in FORMS.values()}) == len(FORMS)


def hooked(model: Any, _patch: pytest.MonkeyPatch) -> None:
    model.model.layers[0].register_forward_pre_hook(lambda *_: None)


def own_forward(model: Any, _patch: pytest.MonkeyPatch) -> None:
    model.model.norm.forward = lambda x: x


def patched(_model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exporting, "tidy", exporting.tidy)


def patched_below(_model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("nbl_export.models.weights.resident", resident)


def patched_elsewhere(_model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("torch.onnx.export", None)


def patched_data(_model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(FORMS, "concat", FORMS["concat"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [hooked, own_forward, patched, patched_below, patched_elsewhere, patched_data],
    ids=lambda f: f.__name__,
)
def test_what_a_test_replaced_is_traced(model: Any, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    other = copy.deepcopy(model)
    change(other, monkeypatch)
    assert key_of(other, CONCAT) is None
    monkeypatch.undo()
    assert key_of(model, CONCAT) is not None


class Mine(torch.nn.Module):
    """Of a test."""


def test_the_same_data_is_the_same_form(model: Any) -> None:
    """As the export stage makes it, with the opset that is asked for."""
    assert key_of(model, replace(STATIC)) == key_of(model, STATIC) is not None
    for other in (
        replace(STATIC, name="mine"),
        replace(STATIC, opset=STATIC.opset - 1),
        replace(STATIC, inputs=dict(reversed(STATIC.inputs.items()))),
        replace(STATIC, examples={"input_ids": torch.ones(2, 3, dtype=torch.long)}),
        replace(STATIC, module=CONCAT.module),
    ):
        assert key_of(model, other) not in (key_of(model, STATIC), None)


def test_a_form_that_a_test_made_is_traced(model: Any) -> None:
    assert key_of(model, replace(STATIC, module=Mine)) is None  # type: ignore[arg-type]
    assert key_of(model, replace(STATIC, module=lambda m: STATIC.module(m))) is None


def test_what_the_function_of_a_form_holds_on_to_decides(tmp_path: Path) -> None:
    """An encoder's form, and one that reads embeddings, have a function made for them."""
    bert = load_model(find_model(str(text_encoder(tmp_path / "bert"))))
    rows = {name: np.ones((1, 4), np.int64) for name in ("input_ids", "attention_mask")}
    task = task_named("feature-extraction")
    mean, first = (Pooling(mode, False, ()) for mode in ("mean", "cls"))
    keys = [key_of(bert, encoder_form(bert, task, pooling, rows)) for pooling in (mean, first, mean)]
    assert keys[0] == keys[2] is not None and keys[0] != keys[1] is not None
    llama = tiny_model("llama", num_hidden_layers=1)
    keys = [key_of(llama, reading_embeds(form, llama)) for form in (CONCAT, STATIC, CONCAT)]
    assert keys[0] == keys[2] is not None
    assert len({keys[0], keys[1], key_of(llama, CONCAT)}) == 3


@pytest.mark.parametrize("cache", FORMS)
def test_what_the_export_stage_traces_is_kept(cache: Any, model: Any) -> None:
    for opset in (None, 18):
        assert key_of(model, _of_opset(FORMS[cache], ExportSettings(kv_cache=cache, opset=opset))) is not None


def test_environment_variables_are_no_replacement(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert key_of(model, CONCAT) is not None


def test_nor_is_what_the_exporter_does_not_import(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbl_export.stages.export.export", None)
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    assert key_of(model, CONCAT) is not None
