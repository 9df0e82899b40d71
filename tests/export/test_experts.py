"""Experts in every form are PyTorch's, in a graph that does not grow with their number."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from nbl_export.errors import InputError
from nbl_export.export.experts import DENSE, LOOP, MOE, check_precision
from nbl_export.export.forms import NONE
from nbl_export.export.torch import trace
from nbl_export.graph.io import save_graph
from nbl_export.graph.operators import remove_unused, routed
from nbl_export.graph.precision import PRECISIONS, to_precision
from nbl_export.runtime.intermediates import compute_tensors
from tests.tiny_types import tiny_model

# Of the one kind of experts each: stored turned or not, with biases or without, gated by what, sent by what.
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 20, "num_experts_per_tok": 3},
    "gpt_oss": {"num_local_experts": 20, "num_experts_per_tok": 4},
    "aria_text": {},
    "deepseek_v3": {"first_k_dense_replace": 0},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 20,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "layer_types": ["full_attention"],
        "num_kv_shared_layers": 0,
    },
    "nemotron_h": {"layers_block_type": ["attention", "moe"], "num_hidden_layers": 2},
}
# What onnxruntime's operator does not compute: the gates of Gemma, and none.
NOT_SWIGLU = ("gemma4_text", "nemotron_h")


def batch(length: int) -> dict[str, np.ndarray[Any, Any]]:
    ids = np.random.default_rng(length).integers(0, 256, (2, length))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.broadcast_to(np.arange(length), ids.shape).copy(),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_computes_what_pytorch_does(kind: str, tmp_path: Path) -> None:
    """A token that goes to an expert alone, and more tokens than experts, which DENSE computes in another way."""
    model = tiny_model(kind, **{"num_hidden_layers": 1, **KINDS[kind]})
    for form in (MOE, LOOP, DENSE):
        graph = trace(model, replace(NONE, experts=form))
        operators = Counter(node.op_type for node in graph.graph)
        assert bool(operators["MoE"]) == (form == MOE and kind not in NOT_SWIGLU)
        save_graph(graph, path := tmp_path / f"{form}.onnx")
        session = onnxruntime.InferenceSession(path)
        for length in (1, 2, 30):
            feeds = {n.name: batch(length)[n.name] for n in session.get_inputs() if n.name in batch(length)}
            (found,) = session.run(["logits"], feeds)
            with torch.inference_mode():
                expected = model(torch.from_numpy(feeds["input_ids"])).logits.numpy()
            assert np.abs(found - expected).max() < 1e-4 * expected.std()


@pytest.mark.parametrize("form", [MOE, LOOP, DENSE])
def test_the_graph_does_not_grow_with_the_experts(form: str) -> None:
    sizes = set()
    for experts in (20, 40):
        model = tiny_model("qwen3_moe", num_experts=experts, num_experts_per_tok=3, num_hidden_layers=1)
        sizes.add(trace(model, replace(NONE, experts=form)).graph.num_nodes())
    assert len(sizes) == 1


@pytest.mark.parametrize(("form", "experts"), [(MOE, 20), (LOOP, 20), (LOOP, 4), (DENSE, 20)])
def test_of_all_experts_a_token_counts_its_own(form: str, experts: int) -> None:
    model = tiny_model("qwen3_moe", num_experts=experts, num_experts_per_tok=2, num_hidden_layers=1)
    of_one = 3 * model.config.hidden_size * model.config.moe_intermediate_size
    found = [one for node in trace(model, replace(NONE, experts=form)).graph if (one := routed(node))]
    assert sum(one.parameters for one in found) == experts * of_one
    assert sum(one.bytes for one in found) >= 4 * experts * of_one
    assert {one.share for one in found} == {2 / experts}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("form", [MOE, LOOP, DENSE])
def test_experts_are_stored_in_half_precision_and_computed_alike(form: str, precision: str) -> None:
    model = tiny_model("qwen3_moe", num_experts=20, num_experts_per_tok=3, num_hidden_layers=1)
    graph = trace(model, replace(NONE, experts=form))
    (exact,) = compute_tensors(graph.clone(), ["logits"], [batch(9)])
    to_precision(graph, PRECISIONS[precision], {})
    stacks = [v for v in graph.graph.initializers.values() if v.shape is not None and len(v.shape) == 3]
    assert len(stacks) == 2 and {v.dtype for v in stacks} == {PRECISIONS[precision].dtype}
    (found,) = compute_tensors(graph, ["logits"], [batch(9)])
    error = np.linalg.norm(found["logits"] - exact["logits"]) / np.linalg.norm(exact["logits"])
    assert 1e-5 < error < {"fp16": 1e-2, "bf16": 0.1}[precision]


def test_experts_that_no_top_k_takes_are_refused_in_half_precision() -> None:
    check_precision(tiny_model("qwen3_moe", **KINDS["qwen3_moe"]), "fp16")
    with pytest.raises(InputError, match="PhimoeExperts is sent its tokens by no top-k"):
        check_precision(tiny_model("phimoe"), "fp16")


def test_what_a_scan_reads_is_gone_with_it() -> None:
    model = tiny_model("qwen3_moe", num_experts=20, num_hidden_layers=1)
    graph = trace(model, replace(NONE, experts=LOOP))
    scan = next(node for node in graph.graph if node.op_type == "Scan")
    ir.convenience.replace_all_uses_with(scan.outputs[0], scan.inputs[0])  # type: ignore[arg-type]
    before = copy.copy(Counter(node.op_type for node in graph.graph))
    remove_unused(graph)
    left = Counter(node.op_type for node in graph.graph)
    assert before["TopK"] == 1 and not left["TopK"] and not left["Scan"] and not left["NonZero"]
