"""What is asked of the stages that make graphs and engines: targets, what suits a task, and what contradicts."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

import pytest

from nbl_export import api, settings
from nbl_export.errors import InputError
from nbl_export.models.tasks import task_named
from nbl_export.settings.graphs import OptionalEngines


@pytest.mark.parametrize("engines", [False, True])
@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ({"target": "onnxruntime"}, ("torch", "fp32", "shared")),
        ({"target": "tensorrt"}, ("torch", "fp16", "static")),
        ({"target": "optimum"}, ("torch", "fp32", "concat")),
        ({"target": "web"}, ("torch", "fp32", "concat")),
        ({"target": "genai"}, ("genai", "fp32", "concat")),
        # Single flags win, and what was said stays where the exporter offers it.
        ({"target": "onnxruntime", "kv_cache": "static"}, ("torch", "fp32", "static")),
        ({"target": "onnxruntime", "precision": "bf16"}, ("torch", "bf16", "shared")),
        ({"target": "genai", "precision": "int4"}, ("genai", "int4", "concat")),
        ({"target": "genai", "exporter": "torch"}, ("torch", "fp32", "concat")),
        ({"target": "tensorrt", "exporter": "optimum"}, ("optimum", "fp32", "concat")),
    ],
)
def test_a_target_says_what_is_not_asked(engines: bool, asked: dict[str, str], made: tuple[str, ...]) -> None:
    settings = api.ExportSettings(**asked)
    settings.check()
    found = settings.resolve(task_named("text-generation"), engines)
    assert (found.exporter, found.precision, found.kv_cache) == made
    # What is made is the same, so what is kept is, too.
    alone = api.ExportSettings(found.precision, found.kv_cache, found.exporter)
    assert found.as_json() == alone.as_json()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"target": "onnx"}, "--target 'onnx' is unknown; choose one of onnxruntime, genai"),
        (
            {"target": "genai", "kv_cache": "static"},
            "'static' is not offered by --exporter genai: choose concat",
        ),
        ({"target": "onnxruntime", "precision": "int4"}, "int4 is for --exporter genai"),
        ({"target": "genai", "inputs": "embeds"}, "--inputs embeds is for --exporter torch, not for genai"),
    ],
)
def test_a_target_that_cannot_have_what_is_asked(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        api.ExportSettings(**asked).check()


def test_an_encoder_has_no_cache_on_any_target_and_no_exporter_of_decoders() -> None:
    encoder = task_named("text-classification")
    assert api.ExportSettings(target="onnxruntime").resolve(encoder).kv_cache == "none"
    with pytest.raises(InputError, match="--target genai is for decoders here"):
        api.ExportSettings(target="genai").resolve(encoder)
    assert api.ExportSettings(target="onnxruntime", opset=18).resolve(encoder).opset == 18
    with pytest.raises(InputError, match="--opset is 24; graphs with --kv-cache none are of opsets 18 to 23"):
        api.ExportSettings(target="tensorrt", opset=24).resolve(encoder)


@pytest.mark.parametrize(
    ("settings", "whose"),
    [
        ({"exporter": "genai"}, "--exporter genai"),
        ({"kv_cache": "shared"}, "--kv-cache shared"),
        ({"target": "genai"}, "--target genai"),
        ({"target": "onnxruntime"}, "--target onnxruntime"),
    ],
)
def test_engines_of_graphs_that_tensorrt_does_not_take(
    tmp_path: Any, tiny_folder: Any, settings: dict[str, str], whose: str
) -> None:
    with pytest.raises(
        InputError, match=rf"TensorRT does not take the graphs of {whose}: .*GroupQuery.*static or concat\.$"
    ):
        api.run(
            tiny_folder,
            tmp_path / "out",
            api.SelectSettings(k=1),
            exporting=api.ExportSettings(**settings),
            engines=api.EngineSettings("rtx"),
        )
    assert not (tmp_path / "out").exists()


def test_engines_are_asked_for_by_naming_their_library() -> None:
    options = OptionalEngines(max_batch=8, sm=("86",))
    assert options.asked is None
    found = replace(options, library="rtx").asked
    assert type(found) is settings.EngineSettings
    assert found == settings.EngineSettings("rtx", max_batch=8, sm=("86",))
    # The same settings with the same defaults, but for that.
    assert {**asdict(OptionalEngines()), "library": "auto"} == asdict(settings.EngineSettings())
