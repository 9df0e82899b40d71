"""onnxruntime-genai's builder: its graph computes PyTorch's model; what it cannot do is said."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel

from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.export.genai import export_genai, require_genai
from nbl_export.installed import pip_line
from nbl_export.progress import Silent
from tests.export.exported import (
    BASE,
    LLAMA3,
    PROMPT,
    graph_logits,
    handed_off,
    nothing_left_over,
    torch_logits,
)
from tests.fixtures_graph import load
from tests.sessions import cpu_session
from tests.tiny import build

pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'")


# onnxruntime's GroupQueryAttention takes head sizes that are multiples of 16.
WIDE = {"hidden_size": 64, "head_dim": 16}


def export(source: Path, folder: Path, precision: str = "fp32") -> list[Path]:
    return export_genai(handed_off(source, folder / "handed"), folder / "out", precision, Silent())


def logits(folder: Path) -> NDArray[Any]:
    return graph_logits(folder / "out" / "model.onnx", PROMPT, cut=70, head_size=16)


@pytest.mark.parametrize("rope", [BASE, LLAMA3], ids=["base", "llama3"])
def test_float32_computes_the_model(tmp_path: Path, rope: dict[str, Any]) -> None:
    own = build(tmp_path / "own", rope_parameters=rope, **WIDE)
    export(own, tmp_path)
    np.testing.assert_allclose(logits(tmp_path), torch_logits(own, PROMPT), atol=2e-4)


def test_graph_comes_with_all_files(stories_folder: Path, tmp_path: Path) -> None:
    files = export(stories_folder, tmp_path)
    names = ["genai_config.json", "model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"]
    assert [p.name for p in files] == names
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(names)
    assert nothing_left_over(tmp_path)
    cpu_session(tmp_path / "out" / "model.onnx")


def test_int4_is_quantized_with_float32_around_it(tmp_path: Path) -> None:
    own = build(tmp_path / "own", **WIDE)
    export(own, tmp_path, "int4")
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False).graph
    assert "MatMulNBits" in {n.op_type for n in graph.node}
    found = logits(tmp_path)
    model = load(own)
    with torch.no_grad():
        to_float = np.abs(found - torch_logits(own, PROMPT)).mean()
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(rounded_to_int4(weight))
        to_rounded = np.abs(found - model(input_ids=torch.tensor([PROMPT])).logits[0].numpy()).mean()
    assert to_rounded < to_float / 4


def rounded_to_int4(weight: torch.Tensor) -> torch.Tensor:
    """Each 32 weights of a row to 16 levels; the largest of them is -8 steps."""
    blocks = weight.reshape(len(weight), -1, 32)
    step = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    return ((blocks / step).round().clamp(-8, 7) * step).reshape(weight.shape)


@pytest.mark.parametrize(
    "precision, dtype", [("fp16", onnx.TensorProto.FLOAT16), ("bf16", onnx.TensorProto.BFLOAT16)]
)
def test_half_precision_is_built_without_a_gpu(tmp_path: Path, precision: str, dtype: int) -> None:
    export(build(tmp_path / "own", num_hidden_layers=1), tmp_path, precision)
    model = onnx.load(str(tmp_path / "out" / "model.onnx"))  # with its data
    types = {v.name: v.type.tensor_type.elem_type for v in [*model.graph.input, *model.graph.output]}
    assert types["past_key_values.0.key"] == types["present.0.value"] == dtype
    weights = {t.data_type for t in model.graph.initializer if len(t.dims) == 2}
    assert weights <= {dtype}


def test_unknown_precision_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose fp32, int4, int8, fp16, bf16"):
        export_genai(tmp_path, tmp_path / "out", "fp8", Silent())
    assert not (tmp_path / "out").exists()


def test_unsupported_architecture_is_one_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    own = build(tmp_path / "own", num_hidden_layers=1)
    GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=1, n_head=4)).save_pretrained(own)
    with pytest.raises(BuildError) as caught:
        export(own, tmp_path)
    message = str(caught.value)
    assert message.startswith("onnxruntime-genai cannot export GPT2LMHeadModel (NotImplementedError: The ")
    assert message.endswith(" model is not currently supported): choose another exporter.")
    assert not (tmp_path / "out").exists() and nothing_left_over(tmp_path)


@pytest.mark.parametrize("trusted", [False, True])
def test_remote_code_runs_only_if_trusted(
    tiny_folder: Path, tmp_path: Path, fake_python: Any, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    monkeypatch.setattr(sys, "executable", fake_python('echo "$@" > filled/model.onnx'))
    export_genai(tiny_folder, tmp_path / "out", "fp32", Silent(), trusted)
    assert f"hf_remote={str(trusted).lower()}" in (tmp_path / "out" / "model.onnx").read_text()


def test_missing_package(bare_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_genai()
    monkeypatch.setattr(sys, "executable", bare_python)
    with pytest.raises(MissingDependencyError, match=re.escape(pip_line("genai"))):
        require_genai()
