"""A graph that is traced without the numbers of its weights is, byte for byte, that of a model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import AutoModelForCausalLM

from nbl_export.export import torch as exporting
from nbl_export.export.forms import FORMS
from nbl_export.export.tidy import StandIns
from nbl_export.export.torch import export_torch, trace
from nbl_export.models import weights
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from tests import families
from tests.models.test_weights import absent, reads, stored_in
from tests.tiny import build as build_tiny

# Blocks are alike, and each takes seconds.
LAYERS = 2
# More numbers than onnx_ir compares to find equal constants.
LARGE = 1025


@pytest.fixture(autouse=True)
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices of tiny models are worth a stand-in, too, but those that the exporter compares by their numbers."""
    monkeypatch.setattr("nbl_export.models.weights._LARGE", 4 * LARGE)


@contextmanager
def traced() -> Iterator[list[Any]]:
    """Within the block, the models that are traced."""
    found: list[Any] = []
    plain = exporting._traced

    def counted(model: Any, *rest: Any) -> Any:
        found.append(model)
        return plain(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "_traced", counted)
        yield found


def streaming(folder: Path) -> Any:
    model = load_model(find_model(str(folder)))
    assert absent(model)
    return model


def in_memory(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def tiny(folder: Path, **changes: Any) -> Path:
    return build_tiny(folder / "m", num_hidden_layers=LAYERS, **changes)


def files(model: Any, folder: Path, form: str = "concat") -> list[bytes]:
    folder.mkdir()
    return [path.read_bytes() for path in export_torch(model, folder / "model.onnx", form=FORMS[form])]


def test_every_kind_of_weight(tmp_path: Path) -> None:
    """Transposed matrices, and projections in one."""
    folder = stored_in(families.build("phi3", tmp_path / "phi3", num_hidden_layers=LAYERS), torch.bfloat16)
    model = streaming(folder)
    with traced() as calls:
        found = files(model, tmp_path / "streaming", "shared")
    assert calls == [model], "the first trace is the last"
    assert found == files(in_memory(folder), tmp_path / "memory", "shared")
    assert absent(model)


def test_a_matrix_is_read_when_it_is_written(tmp_path: Path) -> None:
    model = streaming(stored_in(tiny(tmp_path, tie_word_embeddings=False), torch.bfloat16))
    dummy_run(model)
    small = sorted(n for n, p in model.named_parameters() if p.numel() < LARGE)
    with traced() as calls, reads() as found:
        graph = trace(model, FORMS["concat"])
        assert len(calls) == 1 and sorted(found) == small
        assert absent(model)
        (value,) = (v for n, v in graph.graph.initializers.items() if "layers.1.mlp.up_proj" in n)
        assert value.const_value is not None
        found.clear()
        array = value.const_value.numpy()
    assert found == ["model.layers.1.mlp.up_proj.weight"]
    with weights.resident(model):
        assert np.array_equal(array.T, model.model.layers[1].mlp.up_proj.weight.numpy())


def test_a_weight_that_was_computed_with_is_there_when_it_is_traced_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stored_in(tiny(tmp_path), torch.bfloat16)
    plain = exporting.tidy

    def scaled(model: ir.Model, *rest: Any) -> ir.Model:
        """As an optimizer that merges a factor into a matrix."""
        graph = plain(model, *rest)
        value = next(v for n, v in graph.graph.initializers.items() if "down_proj" in n)
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * 2, name=value.name)
        return graph

    monkeypatch.setattr(exporting, "tidy", scaled)
    model = streaming(folder)
    with traced() as calls:
        found = files(model, tmp_path / "streaming")
    assert len(calls) == 2 and absent(model)
    assert found == files(in_memory(folder), tmp_path / "memory")


def test_stand_ins_are_compared_by_what_they_stand_for(tmp_path: Path) -> None:
    model = streaming(stored_in(tiny(tmp_path), torch.bfloat16))
    with weights.standing_in(model) as found:
        stand_ins = StandIns(found)
        one, other = [s.tensor.numpy() for s in found if s.tensor is not None and s.empty.shape == (64, 32)][
            :2
        ]
        assert stand_ins.equal(one, one) and stand_ins.equal(one.T, one.T)
        assert not stand_ins.equal(one, other), "other numbers, although neither has any"
        assert not stand_ins.equal(one, one.T) and not stand_ins.equal(one[1:], one[:-1])
        zeros = np.zeros((64, 32), np.float32)
        assert not stand_ins.equal(one, zeros) and not stand_ins.equal(zeros, one)
        assert stand_ins.equal(zeros, zeros.copy()) and not stand_ins.equal(zeros, zeros + 1)
