"""onnxruntime-genai generates from our multimodal folders with a tower beside them: the tokens are PyTorch's.

The tower is the user's. Here it is one product, so that PyTorch is given the same features.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from nbl_export import api
from nbl_export.linearize.plan import load_plan
from nbl_export.linearize.swap import linearized
from tests.clients.greedy import by_genai
from tests.conftest import exhaustive
from tests.families import WIDTH
from tests.fixtures_graph import load

IMAGE, COUNT, PATCH = 250, 12, 6
TEXT = [5, 9, 33, 77, 120, 44, 8, 91, 17, 3]
WEIGHT = np.random.default_rng(3).standard_normal((PATCH, WIDTH)).astype(np.float32)


def save_tower(path: Path, name: str) -> None:
    """A vision.onnx that makes a feature of each patch of ``pixel_values``; what it does not need it reads, too."""
    shape = ["num_patches", PATCH]
    inputs = [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, shape)]
    nodes = [helper.make_node("MatMul", ["pixel_values", "weight"], ["image_features"])]
    if name.startswith("qwen"):
        inputs.append(helper.make_tensor_value_info("image_grid_thw", TensorProto.INT64, ["num_images", 3]))
    output = helper.make_tensor_value_info("image_features", TensorProto.FLOAT, ["num_image_tokens", WIDTH])
    graph = helper.make_graph(nodes, "vision", inputs, [output], [numpy_helper.from_array(WEIGHT, "weight")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


def rows_of_positions(prompt: list[int], count: int) -> torch.Tensor:
    """Time, height and width of each token: an image of 2 x 2 has one time, and the text goes on after its longest."""
    first = prompt.index(IMAGE)
    inside = np.array([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]) + first
    after = np.arange(count - first - 4) + first + 2
    rows = [np.concatenate([np.arange(first), row, after]) for row in inside]
    return torch.from_numpy(np.stack(rows))[:, None]


def of_pytorch(model: Any, features: Any, prompt: list[int], rows: int) -> list[int]:
    """Greedily, without a cache, from the embeddings of all tokens so far."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(COUNT):
            ids = torch.tensor([tokens])
            embeds = model.get_input_embeddings()(ids).clone()
            given = {}
            if features is not None:
                embeds[0, [i for i, t in enumerate(prompt) if t == IMAGE]] = torch.from_numpy(features)
                given = {"position_ids": rows_of_positions(prompt, len(tokens))} if rows > 1 else {}
            tokens.append(int(model(inputs_embeds=embeds, **given).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.client
@pytest.mark.parametrize(("name", "rows"), [pytest.param("gemma3", 1, marks=exhaustive), ("qwen2.5-vl", 3)])
def test_text_and_an_image(
    name: str, rows: int, wrapper_folder: Callable[[str], Path], stories_text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = api.CalibrateSettings((str(stories_text),), samples=8, seq_len=64, heldout_samples=2)
    api.calibrate(wrapper_folder(name), out, asked)
    api.select(out, api.SelectSettings(layers=(1,)))
    api.export(out, api.ExportSettings("fp32", "concat", inputs="embeds"))
    api.rewrite(out)
    save_tower(out / "vision.onnx", name)
    assert json.loads((out / "genai_config.json").read_text())["model"]["vision"]["filename"] == "vision.onnx"

    patches = np.random.default_rng(0).standard_normal((4, PATCH)).astype(np.float32)
    inputs = {"pixel_values": patches, "num_image_tokens": np.array([4])}
    if rows > 1:  # of 2 x 2 after each four are merged
        inputs["image_grid_thw"] = np.array([[1, 4, 4]])
    prompt = [*TEXT, 252, *[IMAGE] * 4, 253, 42, 43]
    found, expected = [], []
    with linearized(load(wrapper_folder(name)), load_plan(out / "nbl" / "plan.json")) as model:
        for tokens, given, features in ((TEXT, None, None), (prompt, inputs, patches @ WEIGHT)):
            expected.append(of_pytorch(model, features, tokens, rows))
            found.append(by_genai(out, tokens, COUNT, given))
    assert found == expected
    # Other pixels are another text.
    inputs["pixel_values"] = -patches
    assert by_genai(out, prompt, COUNT, inputs) != found[1]
