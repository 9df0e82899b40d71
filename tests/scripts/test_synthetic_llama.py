"""The synthetic decoder is the Llama it claims to be: onnxruntime gives what transformers gives."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.sessions import cpu_session

SCRIPT = Path(__file__).parents[2] / "scripts" / "synthetic_llama.py"
SMALL: dict[str, Any] = {
    "hidden": 64,
    "layers": 2,
    "heads": 4,  # a head of 16: onnxruntime rotates multiples of 16 only
    "kv_heads": 2,
    "intermediate": 160,
    "vocab": 96,
    "positions": 64,
}
NUMPY = {"fp32": np.float32, "fp16": np.float16}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic_llama", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def weights(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(path)).graph.initializer}


def run(path: Path, ids: np.ndarray, past: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of ``ids`` after ``past``, and the new cache under the names of the inputs."""
    session = cpu_session(path)
    seen = next(iter(past.values())).shape[2]
    mask = np.ones((1, seen + ids.shape[1]), np.int64)
    names = [o.name for o in session.get_outputs()]
    results = dict(
        zip(names, session.run(names, {"input_ids": ids, "attention_mask": mask, **past}), strict=True)
    )
    logits = results.pop("logits")
    return logits, {k.replace("present", "past_key_values"): v for k, v in results.items()}


def empty_cache(dtype: str) -> dict[str, np.ndarray]:
    head = SMALL["hidden"] // SMALL["heads"]
    empty = np.zeros((1, SMALL["kv_heads"], 0, head), NUMPY[dtype])
    return {f"past_key_values.{i}.{part}": empty for i in range(SMALL["layers"]) for part in ("key", "value")}


def transformers_logits(tensors: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The same weights in transformers' Llama, float64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=SMALL["hidden"],
        intermediate_size=SMALL["intermediate"],
        num_hidden_layers=SMALL["layers"],
        num_attention_heads=SMALL["heads"],
        num_key_value_heads=SMALL["kv_heads"],
        vocab_size=SMALL["vocab"],
        max_position_embeddings=SMALL["positions"],
        rms_norm_eps=1e-5,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500_000.0}
    model = LlamaForCausalLM(config).double().eval()
    head = SMALL["hidden"] // SMALL["heads"]
    kv = SMALL["kv_heads"] * head
    state = {
        "model.embed_tokens.weight": tensors["model.embed_tokens.weight"],
        "model.norm.weight": tensors[f"model.layers.{SMALL['layers']}.final_norm_layernorm.weight"],
        "lm_head.weight": tensors["lm_head.MatMul.weight"].T,
    }
    for i in range(SMALL["layers"]):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            state[f"{layer}.{norm}.weight"] = tensors[f"{layer}.{norm}.weight"]
        packed = tensors[f"{layer}.attn.qkv_proj.MatMul.weight"].T
        parts = np.split(packed, [SMALL["hidden"], SMALL["hidden"] + kv])
        for letter, part in zip("qkv", parts, strict=True):
            state[f"{layer}.self_attn.{letter}_proj.weight"] = part
        state[f"{layer}.self_attn.o_proj.weight"] = tensors[f"{layer}.attn.o_proj.MatMul.weight"].T
        for name in ("gate", "up", "down"):
            state[f"{layer}.mlp.{name}_proj.weight"] = tensors[f"{layer}.mlp.{name}_proj.MatMul.weight"].T
    loaded = model.load_state_dict({k: torch.from_numpy(v.astype(np.float64)) for k, v in state.items()})
    assert not loaded.missing_keys and not loaded.unexpected_keys
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids)).logits.numpy()
    return logits


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 2e-5), ("fp16", 0.03)])
def test_prefill_and_decode_equal_transformers(
    script: ModuleType, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    path = script.write_synthetic_llama(tmp_path, dtype=dtype, **SMALL)
    ids = np.random.default_rng(1).integers(0, SMALL["vocab"], (1, 12))
    expected = transformers_logits(weights(path), ids)
    assert expected.std() > 0.5  # a decoder of zeros would agree with anything
    prefill, cache = run(path, ids[:, :9], empty_cache(dtype))
    assert prefill.dtype == NUMPY[dtype]
    np.testing.assert_allclose(prefill, expected[:, :9], atol=tolerance)
    for step in range(9, 12):
        logits, cache = run(path, ids[:, step : step + 1], cache)
        np.testing.assert_allclose(logits, expected[:, step : step + 1], atol=tolerance)


def test_names_are_the_builders(script: ModuleType, tmp_path: Path) -> None:
    path = script.write_synthetic_llama(tmp_path, **SMALL)
    proto = onnx.load(str(path), load_external_data=False)
    assert [i.name for i in proto.graph.input] == [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{i}.{part}" for part in ("key", "value") for i in (0, 1)),
    ]
    nodes = {n.name: n for n in proto.graph.node}
    attention = nodes["/model/layers.1/attn/GroupQueryAttention"]
    assert attention.domain == "com.microsoft"
    assert list(attention.input) == [
        "/model/layers.1/attn/qkv_proj/MatMul/output_0",
        "",
        "",
        "past_key_values.1.key",
        "past_key_values.1.value",
        "/model/attn_mask_reformat/attn_mask_subgraph/Sub/Cast/output_0",
        "/model/attn_mask_reformat/attn_mask_subgraph/Gather/Cast/output_0",
        "cos_cache",
        "sin_cache",
        "",
        "",
        "",
    ]
    skip = nodes["/model/layers.1/input_layernorm/SkipLayerNorm"]
    assert list(skip.input) == [
        "/model/layers.0/post_attention_layernorm/output_3",
        "/model/layers.0/mlp/down_proj/MatMul/output_0",
        "model.layers.1.input_layernorm.weight",
    ]


def test_weights_are_finite_scaled_and_differ_between_layers(script: ModuleType, tmp_path: Path) -> None:
    tensors = weights(script.write_synthetic_llama(tmp_path, **SMALL))
    assert all(np.isfinite(t).all() for t in tensors.values())
    for name, tensor in tensors.items():
        if name.endswith("MatMul.weight"):
            assert tensor.dtype == np.float16
            assert tensor.astype(float).std() == pytest.approx(tensor.shape[0] ** -0.5, rel=0.1), name
        elif name.endswith("layernorm.weight"):
            assert tensor.astype(float).mean() == pytest.approx(1, abs=0.05), name
    first, second = (tensors[f"model.layers.{i}.mlp.gate_proj.MatMul.weight"].astype(float) for i in (0, 1))
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    rows = np.linalg.matrix_rank(first)
    assert rows == SMALL["hidden"]


def test_one_seed_gives_one_model(script: ModuleType, tmp_path: Path) -> None:
    data = [
        script.write_synthetic_llama(tmp_path / name, seed=seed, **SMALL)
        .with_name("model.onnx.data")
        .read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert data[0] == data[1] != data[2]


def test_several_data_files_hold_the_same_weights(script: ModuleType, tmp_path: Path) -> None:
    limit = 40_000
    whole = script.write_synthetic_llama(tmp_path / "whole", **SMALL)
    split = script.write_synthetic_llama(tmp_path / "split", split_bytes=limit, **SMALL)
    files = sorted(split.parent.glob("model.onnx.data*"))
    assert len(files) > 3
    assert all(f.stat().st_size <= limit for f in files)
    a, b = weights(whole), weights(split)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_eight_billion_parameters_sparse(script: ModuleType, tmp_path: Path) -> None:
    path = script.write_synthetic_llama(tmp_path, sparse=True, split_bytes=4 * 10**9)
    files = list(tmp_path.glob("model.onnx.data*"))
    assert sum(f.stat().st_size for f in files) == pytest.approx(16.06e9, rel=0.01)
    assert len(files) == 5 and all(f.stat().st_size <= 4 * 10**9 for f in files)
    assert sum(f.stat().st_blocks * 512 for f in files) < 20e6
    proto = onnx.load(str(path), load_external_data=False)
    assert sum(n.op_type == "GroupQueryAttention" for n in proto.graph.node) == 32
    shapes = {t.name: list(t.dims) for t in proto.graph.initializer}
    assert shapes["model.layers.31.attn.qkv_proj.MatMul.weight"] == [4096, 6144]
    assert shapes["lm_head.MatMul.weight"] == [4096, 128256]


@pytest.mark.slow
def test_writing_streams(tmp_path: Path) -> None:
    """3 GB of real numbers in under 400 MiB of memory."""
    # VmHWM, not ru_maxrss: the latter begins with what this process had when it forked.
    code = (
        "import sys; from pathlib import Path\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "from synthetic_llama import write_synthetic_llama\n"
        "write_synthetic_llama(Path(sys.argv[1]), layers=2)\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_size > 2.9e9
    assert int(result.stdout) < 400 << 10
    assert data.stat().st_blocks * 512 >= data.stat().st_size
    data.unlink()
