"""optimum in an environment of its own: its graph computes PyTorch's model; what it cannot do is said."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from transformers import AutoTokenizer, SeedOssConfig, SeedOssForCausalLM

from nbl_export.errors import BuildError, MissingDependencyError
from nbl_export.export.optimum import export_optimum, find_optimum
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
from tests.tiny import build


@pytest.mark.parametrize("rope", [BASE, LLAMA3], ids=["base", "llama3"])
def test_it_computes_the_model(tmp_path: Path, rope: dict[str, Any], optimum_python: str) -> None:
    own = build(tmp_path / "own", rope_parameters=rope)
    handed = handed_off(own, tmp_path / "handed")
    export_optimum(handed, tmp_path / "out", optimum_python, Silent())
    found = graph_logits(tmp_path / "out" / "model.onnx", PROMPT, cut=70)
    np.testing.assert_allclose(found, torch_logits(own, PROMPT), atol=2e-4)


def test_stories_with_all_files(stories_folder: Path, tmp_path: Path, optimum_python: str) -> None:
    handed = handed_off(stories_folder, tmp_path / "handed")
    out = tmp_path / "out"
    files = export_optimum(handed, out, optimum_python, Silent())
    assert {p.name for p in out.iterdir()} == {p.name for p in files}
    assert {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"} <= {p.name for p in files}
    assert nothing_left_over(tmp_path)
    ids = AutoTokenizer.from_pretrained(out)("Once upon a time, there was a big dog.")["input_ids"]
    assert (
        ids
        == AutoTokenizer.from_pretrained(stories_folder)("Once upon a time, there was a big dog.").input_ids
    )
    found = graph_logits(out / "model.onnx", ids, cut=5)
    np.testing.assert_allclose(found, torch_logits(stories_folder, ids), atol=2e-4)
    # The tied embedding is there once: optimum's post-processing ran.
    shapes = Counter(tuple(sorted(t.dims)) for t in onnx.load(str(out / "model.onnx")).graph.initializer)
    assert shapes[64, 512] == 1


def test_tokenizer_that_optimum_cannot_load_is_copied(
    tmp_path: Path, tiny_folder: Path, fake_python: Any
) -> None:
    python = fake_python("echo graph > filled/model.onnx")
    files = export_optimum(tiny_folder, tmp_path / "out", python, Silent())
    names = [p.name for p in files if p.name != "special_tokens_map.json"]  # which transformers 4 writes too
    assert names == ["model.onnx", "tokenizer.json", "tokenizer_config.json"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_folder / name).read_bytes()


@pytest.mark.parametrize("trusted", [False, True])
def test_remote_code_runs_only_if_trusted(
    tiny_folder: Path, tmp_path: Path, fake_python: Any, trusted: bool
) -> None:
    python = fake_python('echo "$@" > filled/model.onnx')
    export_optimum(tiny_folder, tmp_path / "out", python, Silent(), trusted)
    assert ("--trust-remote-code" in (tmp_path / "out" / "model.onnx").read_text()) is trusted


def test_unsupported_architecture_is_one_sentence(tmp_path: Path, optimum_python: str) -> None:
    own = tmp_path / "own"
    config = SeedOssConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    SeedOssForCausalLM(config).save_pretrained(own)
    with pytest.raises(BuildError) as caught:
        export_optimum(handed_off(own, tmp_path / "handed"), tmp_path / "out", optimum_python, Silent())
    message = str(caught.value)
    assert message.startswith(
        "optimum cannot export SeedOssForCausalLM (ValueError: Trying to export a seed_oss model"
    )
    assert message.endswith("): choose another exporter.") and "\n" not in message
    assert not (tmp_path / "out").exists() and nothing_left_over(tmp_path)


def test_where_optimum_is_looked_for(
    bare_python: str, fake_python: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_python("")
    monkeypatch.setenv("NBL_EXPORT_OPTIMUM_PYTHON", python)
    assert find_optimum() == python
    with pytest.raises(MissingDependencyError, match=r"transformers < 4\.58.*pip install optimum-onnx"):
        find_optimum(bare_python)
    monkeypatch.delenv("NBL_EXPORT_OPTIMUM_PYTHON")
    monkeypatch.setattr(sys, "executable", bare_python)
    with pytest.raises(MissingDependencyError, match=f"not installed for {bare_python}"):
        find_optimum()
    assert find_optimum(python) == python
