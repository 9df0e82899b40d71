"""mobius's graphs compute PyTorch's model; what it cannot do, or does wrong, is said."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export import api
from nbl_export.errors import BuildError, MissingDependencyError
from nbl_export.export.mobius import DTYPES, export_mobius, require_mobius
from nbl_export.installed import pip_line
from nbl_export.progress import Silent
from nbl_export.settings.choices import EXPORTERS
from tests.export.exported import (
    BASE,
    LLAMA3,
    PROMPT,
    graph_logits,
    handed_off,
    nothing_left_over,
    torch_logits,
)
from tests.families import build as family
from tests.tiny import build

pytest.importorskip("mobius", reason="needs mobius-onnx: pip install '.[mobius]'")
WIDE = {"hidden_size": 64, "head_dim": 16}


def export(source: Path, folder: Path, precision: str = "fp32") -> list[Path]:
    return export_mobius(handed_off(source, folder / "handed"), folder / "out", precision, Silent())


@pytest.mark.parametrize("rope", [BASE, LLAMA3], ids=["base", "llama3"])
def test_it_computes_the_model(tmp_path: Path, rope: dict[str, Any]) -> None:
    own = build(tmp_path / "own", rope_parameters=rope, **WIDE)
    files = export(own, tmp_path)
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= {p.name for p in files}
    found = graph_logits(tmp_path / "out" / "model.onnx", PROMPT, cut=70, head_size=16)
    np.testing.assert_allclose(found, torch_logits(own, PROMPT), atol=2e-4)


def test_a_family_that_it_does_not_know_is_one_sentence(tmp_path: Path) -> None:
    source = family("bloom", tmp_path / "own")
    with pytest.raises(
        BuildError, match=r"mobius cannot export BloomForCausalLM \(.*\): choose another exporter"
    ):
        export(source, tmp_path)
    assert nothing_left_over(tmp_path)


def test_a_graph_of_something_else_is_not_proven(stories_text: Path, tmp_path: Path) -> None:
    """It leaves the biases of a Llama's MLPs out."""
    source = family("mha-biases", tmp_path / "own")
    out = tmp_path / "result"
    api.calibrate(source, out, api.CalibrateSettings((str(stories_text),), 64, 64, 4, 4))
    api.select(out, api.SelectSettings(layers=(1,)))
    api.export(out, api.ExportSettings(exporter="mobius"))
    with pytest.raises(BuildError, match=r"Layer 1 is not proven: .*this graph is not of the model"):
        api.rewrite(out)
    assert not (out / "model.onnx").exists()


def test_without_it(monkeypatch: pytest.MonkeyPatch, bare_python: str) -> None:
    assert set(DTYPES) == set(EXPORTERS["mobius"].precisions)
    monkeypatch.setattr(sys, "executable", bare_python)
    with pytest.raises(MissingDependencyError) as caught:
        require_mobius()
    assert f"install it with `{pip_line('mobius')}`" in str(caught.value)
