"""Graphs of quantized weights are rewritten: W is quantized alike, and loses no more than the graph did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from nbl_export.batch.arrays import F32
from nbl_export.blocks import Mlp
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.models.candidates import blocks_of
from tests.end_to_end.matrix import (
    BUILDER,
    CHOSEN,
    assert_exactly_the_plan_is_gone,
    assert_folder_is_told,
    file_bytes,
    parity,
    rewritten,
)
from tests.exhaustive import exhaustive
from tests.exporters import GRAPH, Graphs
from tests.families import Calibrated

ROWS_AT_ONCE = 4  # divides every projection of every family


USUAL = (("llama-gqa", "one"), ("fused-qkv", "half"))


@pytest.mark.parametrize(
    ("bits", "family", "k"),
    [
        *(
            pytest.param(4, f, k, id=f"int4-{f}-{k}", marks=() if (f, k) in USUAL else exhaustive)
            for f in BUILDER
            for k in (CHOSEN if f == "llama-gqa" else ["half"])
        ),
        pytest.param(8, "llama-gqa", "half", id="int8-llama-gqa-half"),
    ],
)
def test_few_bits(
    graphs: Graphs, calibrated_of: Callable[[str], Calibrated], tmp_path: Path, bits: int, family: str, k: str
) -> None:
    exporter = f"genai-int{bits}"
    source, case = graphs(exporter, family), calibrated_of(family)
    plan = case.plan(CHOSEN[k])
    out, _ = rewritten(source, plan, tmp_path)
    assert_exactly_the_plan_is_gone(exporter, source, out, plan)
    assert_folder_is_told(source, out, plan)
    assert file_bytes(out) < file_bytes(source)
    assert_loses_no_more(case.model, plan, source, out, f"int{bits}")
    # What the numbers stand for, put into PyTorch: the same to the last digits.
    matrices = dequantized(out / GRAPH)
    stored = {i: matrices.pop(f"layers.{i}.nbl_linear.matmul") for i in plan.chosen}
    for layer, linear in plan.layers.items():
        # The largest weight of a block sets its step: an MLP's W has larger ones among small ones.
        bound = 0.2 if isinstance(layer, Mlp) else 0.15
        assert 0 < relative(stored[layer], linear.w) < bound / 2 ** (bits - 4)
    meant = replace(plan, layers={i: LinearLayer(w, plan.layers[i].b) for i, w in stored.items()})
    computed_in_float32(out / GRAPH, tmp_path / GRAPH)
    with weights_of(case.model, list(matrices.values()), plan):
        assert parity(case.model, meant, tmp_path / GRAPH).failures() == []


def assert_loses_no_more(model: Any, plan: Plan, source: Path, out: Path, dtype: str = "int4") -> None:
    own = parity(model, plan.without_layers(), source / GRAPH, dtype)
    assert parity(model, plan, out / GRAPH, dtype).failures_against(own, "the unmodified graph") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exporter", "family"),
    [
        ("optimum+nbits", "llama-gqa"),
        ("optimum+qdq", "mha-biases"),
        pytest.param("dynamo-18-sdpa+qdq", "fused-qkv", marks=exhaustive),
        ("optimum+dynamic", "llama-gqa"),
        pytest.param("dynamo-18-sdpa+dynamic", "parallel-residual", marks=exhaustive),
    ],
)
def test_quantized_by_onnxruntime(
    graphs: Graphs, calibrated_of: Callable[[str], Calibrated], tmp_path: Path, exporter: str, family: str
) -> None:
    source, case = graphs(exporter, family), calibrated_of(family)
    plan = case.plan(CHOSEN["half"])
    out, _ = rewritten(source, plan, tmp_path)
    assert_exactly_the_plan_is_gone(exporter, source, out, plan)
    dtype = "int8" if exporter.endswith("dynamic") else "int4"
    assert_loses_no_more(case.model, plan, source, out, dtype)
    assert file_bytes(out) < file_bytes(source)
    # W is stored as its neighbours are: read by the operator that reads theirs.
    kind = {"nbits": "MatMulNBits", "qdq": "DequantizeLinear", "dynamic": "MatMulInteger"}
    graph = onnx.load(str(out / GRAPH), load_external_data=False).graph
    stored = {t.name for t in graph.initializer if t.name.startswith("layers.1.nbl_linear.weight")}
    readers = {n.op_type for n in graph.node if stored & set(n.input)}
    assert kind[exporter.split("+")[1]] in readers and "MatMul" not in readers


def dequantized(path: Path) -> dict[str, F32]:
    """The weights [outputs, inputs] of every MatMulNBits, by the node's name: (number - half) · scale."""
    graph = onnx.load(str(path)).graph
    arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            columns = next(a.i for a in node.attribute if a.name == "K")
            packed, scales = arrays[node.input[1]], arrays[node.input[2]]
            assert all(arrays[name].dtype != np.uint8 for name in node.input[3:] if name in arrays)
            bits = next(a.i for a in node.attribute if a.name == "bits")
            halves = [packed & 15, packed >> 4] if bits == 4 else [packed]
            numbers = np.stack(halves, axis=-1).reshape(*packed.shape[:2], -1)
            values = (numbers.astype(np.float32) - 2 ** (bits - 1)) * scales.reshape(*packed.shape[:2], 1)
            found[node.name] = values.reshape(len(packed), -1)[:, :columns]
    return found


def computed_in_float32(source: Path, target: Path) -> None:
    """The same graph; accuracy level 4 also rounds activations to 8 bits, which PyTorch does not."""
    proto = onnx.load(str(source))
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(proto, str(target))


@contextmanager
def weights_of(model: Any, matrices: Sequence[F32], plan: Plan) -> Iterator[None]:
    """``model`` with every few rows of its weights replaced by the nearest ones of ``matrices``.

    Exporters join projections, or split them; rows they leave alone.
    """
    gone = tuple(one.module for one in blocks_of(model) if one.index in plan.layers)
    before = {name: module.weight.data for name, module in linear_modules(model).items()}
    try:
        for name, module in linear_modules(model).items():
            if name.startswith(gone):
                continue
            weight = module.weight.data.numpy()
            found, error = nearest(weight, matrices)
            assert 0 < error < 0.2, name
            module.weight.data = torch.from_numpy(found)
        yield
    finally:
        for name, module in linear_modules(model).items():
            module.weight.data = before[name]


def nearest(weight: F32, matrices: Sequence[F32]) -> tuple[F32, float]:
    """``weight`` with every few rows replaced by the nearest ones of ``matrices``, and the worst error of any."""
    columns = weight.shape[1]
    there = np.concatenate([m.reshape(-1, ROWS_AT_ONCE * columns) for m in matrices if m.shape[1] == columns])
    wanted = weight.reshape(-1, ROWS_AT_ONCE * columns)
    errors = np.stack([np.linalg.norm(there - rows, axis=1) / np.linalg.norm(rows) for rows in wanted])
    return there[errors.argmin(axis=1)].reshape(weight.shape), float(errors.min(axis=1).max())


def linear_modules(model: Any) -> dict[str, torch.nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def relative(found: F32, expected: F32) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
