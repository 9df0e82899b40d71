"""Graphs that differ from the tiny Llama's: biases, another family, attention in its parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nbl_export.export.forms import CONCAT
from nbl_export.export.torch import export_torch, tidy
from nbl_export.graph.io import save_graph
from nbl_export.models.dummy_run import dummy_run

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Variant:
    """A random two-layer model and its graph; ``writer`` is the op that writes the attention's output."""

    kind: str
    model: Any
    path: Path
    core: str
    writer: str


@pytest.fixture(scope="session", params=["llama with biases", "qwen2", "decomposed llama"])
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    kind = request.param
    torch.manual_seed(0)
    model: Any
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=kind == "llama with biases"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        # Biases start at zero and norms at one; neither would be missed.
        parameter.add_(torch.randn_like(parameter) * 0.3)
    model.eval()
    path = tmp_path_factory.mktemp("variant") / "model.onnx"
    if kind != "decomposed llama":
        export_torch(model, path)
        # Llama's attention_bias gives o_proj a bias too; Qwen2 has biases on q, k and v only.
        return Variant(kind, model, path, "Attention", "Add" if kind == "llama with biases" else "MatMul")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        program = torch.onnx.export(
            CONCAT.capture(CONCAT.module(model)), dynamo=True, opset_version=18, verbose=False
        )
    assert program is not None
    save_graph(tidy(program.model, replace(CONCAT, opset=18), dummy_run(model).cache), path)
    return Variant(kind, model, path, "MatMul", "MatMul")
