"""A Triton repository: its configurations by Triton's own schema, and its states carried as Triton would carry them."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export import api
from tests.clients.test_generating import greedy

pytestmark = pytest.mark.client
COUNT = 24
PROMPT = [1, 403, 407, 261, 378]
TYPES = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_INT64": np.int64}


@pytest.fixture(scope="module")
def schema() -> Any:
    """The module that reads a configuration."""
    path = os.environ.get("NBL_EXPORT_TRITON_SCHEMA", "")
    if not path:
        pytest.skip("needs Triton's schema: scripts/test.sh fetches it and sets NBL_EXPORT_TRITON_SCHEMA")
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # made for an earlier protobuf
        spec.loader.exec_module(module)
    return module


class Served:
    """A model of the repository as Triton serves it: what its configuration says is all that is known of it."""

    def __init__(self, folder: Path, schema: Any) -> None:
        import onnxruntime
        from google.protobuf import text_format

        self.config = text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())
        self.type_of = schema.DataType.Name
        self._session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
        self._states: dict[str, Any] = {}

    def request(self, start: bool, **given: Any) -> dict[str, Any]:
        states = self.config.sequence_batching.state
        if start:
            self._states = {
                one.input_name: np.zeros((1, *first.dims), TYPES[self.type_of(first.data_type)])
                for one in states
                for first in one.initial_state
            }
        assert {one.name for one in self.config.input} == given.keys()
        names = [one.name for one in (*self.config.output,)] + [one.output_name for one in states]
        for one in self.config.input:
            value = given[one.name]
            assert value.dtype == TYPES[self.type_of(one.data_type)] and len(value.shape) == 1 + len(one.dims)
        found = dict(zip(names, self._session.run(names, given | self._states), strict=True))
        for one in states:
            shape = found[one.output_name].shape[1:]
            assert all(told in (-1, own) for told, own in zip(one.dims, shape, strict=True))
            self._states[one.input_name] = found[one.output_name]
        return found


@pytest.mark.parametrize("cache", ["concat", "shared"])
def test_a_sequence_goes_on_from_its_states(
    stories_copy: Path, tmp_path: Path, schema: Any, cache: str
) -> None:
    if cache != "concat":
        api.export(stories_copy, api.ExportSettings("fp32", cache))
        api.rewrite(stories_copy)
        assert api.verify(stories_copy, api.VerifySettings(speed=False)).passed
    api.package(stories_copy, tmp_path / "package", layout="triton", base=True)
    for role, layers in (("linearized", 3), ("base", 5)):
        folder = tmp_path / "package" / "models" / role
        model = Served(folder, schema)
        assert len(model.config.sequence_batching.state) == 2 * layers
        tokens, ids = [], np.array([PROMPT])
        for length in range(len(PROMPT), len(PROMPT) + COUNT):
            positions = np.arange(length - ids.shape[1], length)[None]
            mask = np.ones((1, length), np.int64)
            found = model.request(not tokens, input_ids=ids, attention_mask=mask, position_ids=positions)
            tokens.append(int(found["logits"][0, -1].argmax()))
            ids = np.array([tokens[-1:]])
        assert tokens == greedy(folder / "1" / "model.onnx", PROMPT, COUNT)
    assert sorted(p.name for p in (tmp_path / "package" / "models").iterdir()) == ["base", "linearized"]


def test_the_configuration_of_an_engine_is_of_the_schema(stories_out: Path, schema: Any) -> None:
    from google.protobuf import text_format

    from nbl_export.export.layouts import triton_config
    from nbl_export.graph.io import load_graph

    model = load_graph(stories_out / "model.onnx")
    config = text_format.Parse(triton_config(model, profiles=2), schema.ModelConfig())
    assert config.backend == "tensorrt" and len(config.sequence_batching.state) == 2 * 3
    (group,) = config.instance_group
    assert (group.kind, [*group.profile]) == (schema.ModelInstanceGroup.KIND_GPU, ["0", "1"])
