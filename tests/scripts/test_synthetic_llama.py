"""The synthetic decoder is the Llama it claims to be: onnxruntime gives what transformers gives."""

from __future__ import annotations

import importlib.util
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
