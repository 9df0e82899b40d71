"""onnxruntime-genai, optimum and Polygraphy take our folders and their own: the tokens are our decode loop's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from nbl_export import api
from nbl_export.export.tidy import add_num_logits_input_to_file, sliced_lm_head
from nbl_export.export.torch import save_in_precision, trace
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import PRECISIONS
from nbl_export.linearize.plan import load_plan, save_plan
from nbl_export.linearize.swap import linearized
from nbl_export.rewrite.foreign import rewrite_foreign
from nbl_export.runtime.ort import OrtModel
from tests import tiny
from tests.conftest import exhaustive
from tests.exporters import GRAPH, Graphs, optimum_python
from tests.families import WIDTH, Calibrated
from tests.fixtures_graph import load
from tests.tiny import save_tokenizer
from tests.tiny_types import tiny_model

pytestmark = pytest.mark.client


def greedy(path: Path, prompt: list[int], count: int) -> list[int]:
    """The ``count`` likeliest tokens after ``prompt``, one after the other, from the graph at ``path``."""
    decoder = OrtModel(path, rounded=False)  # as others run it
    past, ids = decoder.empty_past(1), np.array([prompt], dtype=np.int64)
    positions, tokens = np.arange(len(prompt))[None], []
    for _ in range(count):
        length = int(positions[0, -1]) + 1
        output = decoder(ids, np.ones((1, length), dtype=np.int64), positions, past)
        past = output.present
        tokens.append(int(output.logits[0, -1].argmax()))
        ids, positions = np.array([[tokens[-1]]], dtype=np.int64), np.array([[length]])
    return tokens


def by_genai(
    folder: Path, prompt: list[int], count: int, inputs: Mapping[str, Any] | None = None, ends: bool = False
) -> list[int]:
    """``count`` tokens by onnxruntime-genai, or fewer where a text ``ends``; ``inputs`` beside the ids."""
    genai = pytest.importorskip(
        "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
    )
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    length = len(prompt) + count
    parameters.set_search_options(
        max_length=length, do_sample=False, **({} if ends else {"min_length": length})
    )
    generator = genai.Generator(model, parameters)
    if inputs is None:
        generator.append_tokens(np.array([prompt], dtype=np.int32))
    else:
        named = genai.NamedTensors()
        for name, array in {"input_ids": np.array([prompt], dtype=np.int32), **inputs}.items():
            named[name] = array
        generator.set_inputs(named)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


# our folders ------------------------------------------------------------------------------------

COUNT = 24
PROMPT = [1, 403, 407, 261, 378]  # "<s> Once upon a time"
TOKENS = list(range(40, 52))
# No token ends the text; it is run where there is optimum and none of this package.
GENERATE = """
import json, sys
import torch
from optimum.onnxruntime import ORTModelForCausalLM

folder, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = ORTModelForCausalLM.from_pretrained(folder)
ids = torch.tensor([prompt])
model.generation_config.eos_token_id = None
tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
print(json.dumps(tokens[0, len(prompt):].tolist()))
"""


@pytest.mark.parametrize(
    ("precision", "cache"),
    [
        ("fp32", "concat"),
        ("fp16", "shared"),
        pytest.param("fp16", "concat", marks=exhaustive),
        pytest.param("fp32", "shared", marks=exhaustive),
    ],
)
def test_genai_generates_what_our_decoder_does(stories_copy: Path, precision: str, cache: str) -> None:
    if (precision, cache) != ("fp32", "concat"):
        api.export(stories_copy, api.ExportSettings(precision, cache))
        api.rewrite(stories_copy)
    for folder in (stories_copy, stories_copy / "baseline"):
        told = json.loads((folder / "genai_config.json").read_text())
        assert told["search"]["past_present_share_buffer"] is (cache == "shared")
        assert by_genai(folder, PROMPT, COUNT, ends=True) == greedy(folder / GRAPH, PROMPT, COUNT)


@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=exhaustive), "int4"])
def test_genai_generates_from_its_own_folder_rewritten(
    graphs: Graphs,
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
    precision: str,
) -> None:
    source = graphs(f"genai-{precision}", "llama-gqa")
    save_plan(tmp_path / "plan.json", calibrated_of("llama-gqa").plan((1, 3)))
    folder = tmp_path / "folder"
    rewrite_foreign(source, tmp_path / "plan.json", folder)
    tokens = by_genai(folder, TOKENS, COUNT, ends=True)
    assert tokens == greedy(folder / GRAPH, TOKENS, COUNT)
    assert tokens != greedy(source / GRAPH, TOKENS, COUNT)
    assert by_genai(source, TOKENS, COUNT, ends=True) == greedy(source / GRAPH, TOKENS, COUNT)


@pytest.mark.parametrize("cache", ["concat", "shared"])
def test_a_ragged_batch_gives_each_prompt_what_it_gives_alone(stories_copy: Path, cache: str) -> None:
    """It pads on the right and reads every row's last logits: what a graph of the last position would not have."""
    genai = pytest.importorskip(
        "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
    )
    if cache != "concat":
        api.export(stories_copy, api.ExportSettings(kv_cache=cache))
        api.rewrite(stories_copy)
    model = genai.Model(str(stories_copy))
    tokenizer = genai.Tokenizer(model)

    def tokens(prompts: list[str]) -> list[list[int]]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=64, do_sample=False, batch_size=len(prompts))
        generator = genai.Generator(model, parameters)
        generator.append_tokens(tokenizer.encode_batch(prompts))
        for _ in range(12):
            generator.generate_next_token()
        return [[int(t) for t in generator.get_sequence(i)[-12:]] for i in range(len(prompts))]

    prompts = ["Once upon a time", "One day a little girl named Lily found a big"]
    alone = [tokens([prompt])[0] for prompt in prompts]
    assert alone[0] != alone[1]
    assert tokens(prompts) == alone


@pytest.mark.parametrize(
    "model_type", ["lfm2", *(pytest.param(name, marks=exhaustive) for name in ("bamba", "qwen3_next"))]
)
def test_states_beside_the_cache_are_carried_from_token_to_token(model_type: str, tmp_path: Path) -> None:
    """Short convolutions, state-space models and linear attention, before and after a layer of attention is linear."""
    model = tmp_path / "model"
    tiny_model(model_type).save_pretrained(model)
    save_tokenizer(model)
    text = api.CalibrateSettings(samples=8, seq_len=64, heldout_samples=2)
    api.calibrate(model, tmp_path / "out", text)
    api.select(tmp_path / "out", api.SelectSettings(layers=(1,)))
    api.export(tmp_path / "out")
    api.rewrite(tmp_path / "out")
    found = []
    for folder in (tmp_path / "out" / "baseline", tmp_path / "out"):
        found.append(by_genai(folder, TOKENS, COUNT, ends=True))
        assert found[-1] == greedy(folder / GRAPH, TOKENS, COUNT)[: len(found[-1])]
    assert found[0] != found[1] and min(map(len, found)) > 4


# optimum ------------------------------------------------------------------------------------------


def by_optimum(folder: Path) -> list[int]:
    command = [optimum_python(), "-c", GENERATE, str(folder), json.dumps(TOKENS), str(COUNT)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    tokens: list[int] = json.loads(found.stdout.splitlines()[-1])
    return tokens


@pytest.mark.parametrize("family", ["llama-gqa", pytest.param("parallel-residual", marks=exhaustive)])
@pytest.mark.parametrize("layers", [(0,)], ids=["one"])
def test_optimum_generates_what_our_decoder_does(
    graphs: Graphs,
    calibrated_of: Callable[[str], Calibrated],
    tmp_path: Path,
    family: str,
    layers: tuple[int, ...],
) -> None:
    source = graphs("optimum", family)
    save_plan(tmp_path / "plan.json", calibrated_of(family).plan(layers))
    rewrite_foreign(source, tmp_path / "plan.json", tmp_path / "out")
    add_num_logits_input_to_file(tmp_path / "out" / GRAPH)  # as a run with its exporter does
    assert sliced_lm_head(load_graph(tmp_path / "out" / GRAPH)) is not None
    tokens = by_optimum(tmp_path / "out")
    assert len(tokens) == COUNT
    assert tokens == greedy(tmp_path / "out" / GRAPH, TOKENS, COUNT)
    assert tokens != greedy(source / GRAPH, TOKENS, COUNT)


# images -----------------------------------------------------------------------------------------

IMAGE, PATCH = 250, 6
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
        for _ in range(COUNT // 2):
            ids = torch.tensor([tokens])
            embeds = model.get_input_embeddings()(ids).clone()
            given = {}
            if features is not None:
                embeds[0, [i for i, t in enumerate(prompt) if t == IMAGE]] = torch.from_numpy(features)
                given = {"position_ids": rows_of_positions(prompt, len(tokens))} if rows > 1 else {}
            tokens.append(int(model(inputs_embeds=embeds, **given).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


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
            found.append(by_genai(out, tokens, COUNT // 2, given))
    assert found == expected
    # Other pixels are another text.
    inputs["pixel_values"] = -patches
    assert by_genai(out, prompt, COUNT // 2, inputs) != found[1]


# polygraphy -------------------------------------------------------------------------------------


def test_polygraphy_builds_an_exported_graph(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    tool = shutil.which("polygraphy", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("needs polygraphy")
    # Polygraphy insists on fused attention, which has kernels for four heads of 64, not for smaller ones.
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    model = load(tiny.build(tmp_path / "model", **sizes))
    graph, engine = tmp_path / "graph" / "model.onnx", tmp_path / "model.engine"
    save_in_precision(trace(model), graph, PRECISIONS["bf16"], [])
    done = subprocess.run(
        [tool, "convert", str(graph), "--convert-to", "trt", "-o", str(engine)],
        capture_output=True,
        text=True,
        env=os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert engine.stat().st_size > graph.with_name("model.onnx.data").stat().st_size / 2
