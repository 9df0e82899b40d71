"""Random small decoders, written in many ways and disguised, are rewritten right or refused with a reason.

What the rewritten graph must compute is what the plain graph does with the maps put in by hand.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from nbl_export.errors import BuildError, InputError
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite.replace import RewriteResult, rewrite_file
from nbl_export.settings.choices import FitInput
from tests.end_to_end.disguises import DISGUISES
from tests.end_to_end.oracle import assert_computes, random_plan
from tests.end_to_end.random_decoder_graphs import Written, written
from tests.end_to_end.random_decoders import (
    ATTENTIONS,
    BLOCKS,
    CACHES,
    LENGTHS,
    LINEARS,
    NORMS,
    O_BIASES,
    Choices,
    Weights,
    choices,
    possible,
    random_weights,
)

_EXHAUSTIVE = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "suppress_health_check": list(HealthCheck),
    "print_blob": False,
}
# What a refusal may say: a layer and a check, or what is wrong with the whole graph.
REASON = re.compile(
    r"layer \d+: .+ \(found: .+\)|Layer \d+ (is not proven: |cannot be removed: |cannot be replaced: )"
    r"|The graph has \d+ attention layers, the plan is for \d+"
)

FUSED = {"block": "fused", "norm": "SimplifiedLayerNormalization"}
SINGLE: dict[str, dict[str, Any]] = {
    "plain": {},
    **{a: {"attention": a} for a in ATTENTIONS},
    **{f"{a}, no cache": {"attention": a, "cache": "none"} for a in ATTENTIONS if a != "GroupQueryAttention"},
    **{f"{a}, grouped": {"attention": a, "heads": 4, "kv_heads": 2} for a in ATTENTIONS},
    **{f"{a}, one key head": {"attention": a, "kv_heads": 1} for a in ATTENTIONS},
    **{f"linear {k}": {"linear": k} for k in LINEARS},
    **{f"linear {k}, biases": {"linear": k, "qkv_bias": True, "o_bias": "inside"} for k in LINEARS},
    "linear MatMulNBits, asymmetric": {"linear": "MatMulNBits", "symmetric": False},
    **{f"norm {n}": {"norm": n} for n in NORMS},
    **{f"q/k norm {n}": {"norm": n, "qk_norm": True} for n in NORMS},
    **{f"block {b}": {"block": b} for b in BLOCKS},
    "block fused, LayerNormalization": {**FUSED, "norm": "LayerNormalization"},
    **{f"o bias {b}": {"o_bias": b, **(FUSED if b == "skip norm" else {})} for b in O_BIASES},
    "o bias in a SkipLayerNormalization": {**FUSED, "norm": "LayerNormalization", "o_bias": "skip norm"},
    **{f"cache {n}": {"cache": n} for n in CACHES},
    **{f"cache {n}, shuffled": {"cache": n, "shuffled": True, "layers": 3} for n in CACHES},
    **{f"length of {n}": {"length": n, "positions": "counted"} for n in LENGTHS},
    "packed, Split": {"packing": "Split", "qkv_bias": True},
    "packed, Slice": {"packing": "Slice", "qkv_bias": True},
    "packed, Gemm": {"packing": "Split", "linear": "Gemm", "qkv_bias": True},
    "optimum's guard against NaN": {"nan_guard": True},
    "scaled by Div": {"scale": "Div"},
    "masked by Where": {"mask": "Where"},
    "tied embeddings": {"tied": True},
    "one attention for all layers": {"shared": True},
    "opset 14": {"opset": 14, "norm": "decomposed"},
    "opset 17": {"opset": 17, "norm": "decomposed", "positions": "counted"},
    "one layer": {"layers": 1},
    "logits last": {"layers": 3, "logits_last": True},
    # The stream that a second layer reads is the second output of a node that runs.
    "block fused, MatMulNBits": {**FUSED, "layers": 3, "linear": "MatMulNBits"},
    "four layers": {"layers": 4, "width": 16, "heads": 4},
}


# helpers -----------------------------------------------------------------------------------------


def saved(folder: Path, proto: onnx.ModelProto) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return folder / "model.onnx"


def rewritten(
    folder: Path, c: Choices, weights: Weights, graph: Written, layers: Sequence[int], fit_input: FitInput
) -> tuple[Path, Plan, RewriteResult]:
    plan = random_plan(c, weights, layers, fit_input)
    target = folder / "rewritten" / "model.onnx"
    result = rewrite_file(saved(folder, graph.proto), plan, target)
    return target, plan, result


def assert_reason(error: Exception, reason: re.Pattern[str] = REASON) -> None:
    text = str(error)
    assert "\n" not in text
    assert reason.search(text), text


# every single choice -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", SINGLE)
def test_each_choice_is_rewritten(name: str, tmp_path: Path) -> None:
    c = possible(replace(Choices(), **SINGLE[name]))
    weights = random_weights(c)
    graph = written(c, weights)
    for layers, fit_input in (((0,), "normed"), (range(c.layers), "residual")):
        folder = tmp_path / fit_input
        path, plan, result = rewritten(folder, c, weights, graph, layers, fit_input)  # type: ignore[arg-type]
        assert_computes(path, c, weights, plan)
        assert result.before.kv_pairs - result.after.kv_pairs == (len(layers) if c.cache != "none" else 0)


@pytest.mark.parametrize("name", DISGUISES)
@pytest.mark.parametrize("attention", ["decomposed", "Attention with past"])
def test_each_disguise_is_seen_through(name: str, attention: str, tmp_path: Path) -> None:
    c = Choices(attention=attention, norm="decomposed", qkv_bias=True, o_bias="Add")
    weights = random_weights(c)
    graph = written(c, weights)
    plain = graph.proto.SerializeToString()
    DISGUISES[name](graph.proto, random.Random(2))
    assert graph.proto.SerializeToString() != plain
    path, plan, _ = rewritten(tmp_path, c, weights, graph, (0,), "normed")
    assert_computes(path, c, weights, plan)


# any choices -------------------------------------------------------------------------------------


def layers_of(c: Choices, data: st.DataObject) -> tuple[list[int], FitInput]:
    some = st.lists(st.sampled_from(range(c.layers)), unique=True, min_size=1)
    return data.draw(some), data.draw(st.sampled_from(("normed", "residual")))  # type: ignore[return-value]


disguises = st.lists(st.sampled_from(sorted(DISGUISES)), max_size=4, unique=True)
seeds = st.integers(0, 2**31)


@settings(max_examples=60, **_EXHAUSTIVE)  # type: ignore[arg-type]
@given(choices(), st.data())
def test_plain_decoders_are_rewritten(c: Choices, data: st.DataObject) -> None:
    """Whoever refuses everything fails here."""
    weights = random_weights(c)
    graph = written(c, weights)
    layers, fit_input = layers_of(c, data)
    with tempfile.TemporaryDirectory() as folder:
        path, plan, _ = rewritten(Path(folder), c, weights, graph, layers, fit_input)
        assert_computes(path, c, weights, plan)


@settings(max_examples=150, **_EXHAUSTIVE)  # type: ignore[arg-type]
@given(choices(), disguises, seeds, st.data())
def test_disguised_decoders_are_rewritten_right_or_refused(
    c: Choices, names: list[str], seed: int, data: st.DataObject
) -> None:
    weights = random_weights(c)
    graph = written(c, weights)
    for name in names:
        DISGUISES[name](graph.proto, random.Random(seed))
    layers, fit_input = layers_of(c, data)
    with tempfile.TemporaryDirectory() as folder:
        try:
            path, plan, _ = rewritten(Path(folder), c, weights, graph, layers, fit_input)
        except (InputError, BuildError) as refusal:
            assert_reason(refusal)
            # Only these hide something that would have to be undone first.
            assert {"twins", "dead"} & set(names), refusal
            assert not list(Path(folder).glob("rewritten/*"))
            return
        assert_computes(path, c, weights, plan)


# refusals ----------------------------------------------------------------------------------------

PLAIN = Choices(layers=3, qkv_bias=True, o_bias="Add")
TRIES: list[Choices] = [
    PLAIN,
    replace(PLAIN, cache="none"),
    replace(PLAIN, attention="Attention", block="sandwich"),
    replace(PLAIN, attention="MultiHeadAttention", cache="arbitrary", packing="Split"),
    replace(PLAIN, attention="GroupQueryAttention", **FUSED),
]


def refusal(folder: Path, proto: onnx.ModelProto, plan: Plan) -> Exception:
    """Why ``plan`` is refused for ``proto``; the target folder must not hold anything then."""
    with pytest.raises((InputError, BuildError)) as caught:
        rewrite_file(saved(folder, proto), plan, folder / "rewritten" / "model.onnx")
    assert not list((folder / "rewritten").rglob("*"))
    return caught.value


@pytest.mark.parametrize("c", TRIES, ids=lambda c: c.attention)
@pytest.mark.parametrize("fit_input", ["normed", "residual"])
def test_a_plan_of_another_decoder_is_refused(c: Choices, fit_input: FitInput, tmp_path: Path) -> None:
    weights = random_weights(c)
    other = random_plan(c, random_weights(replace(c, seed=1)), (1,), fit_input)
    graph = written(c, weights)
    assert "Layer 1 is not proven" in str(refusal(tmp_path, graph.proto, other))
    deeper = random_plan(c, weights, (1,), fit_input)
    deeper = replace(deeper, layer_count=4, probe_y={**deeper.probe_y, 3: deeper.probe_y[0]})
    assert "has 3 attention layers, the plan is for 4" in str(refusal(tmp_path, graph.proto, deeper))


@pytest.mark.parametrize("c", TRIES, ids=lambda c: c.attention)
@pytest.mark.parametrize("fit_input", ["normed", "residual"])
def test_swapped_layers_are_refused(c: Choices, fit_input: FitInput, tmp_path: Path) -> None:
    weights = random_weights(c)
    plan = random_plan(c, weights, (0, 2), fit_input)
    graph = written(c, weights)
    u, y = ({**probe, 0: probe[2], 2: probe[0]} for probe in (plan.probe_u, plan.probe_y))
    for wrong in (replace(plan, probe_u=u), replace(plan, probe_y=y), replace(plan, probe_u=u, probe_y=y)):
        assert "is not proven" in str(refusal(tmp_path, graph.proto, wrong))


@pytest.mark.parametrize("name", ["1.q", "1.k", "1.v", "1.o", "1.v.bias", "1.o.bias", "1.before.scale"])
@pytest.mark.parametrize("cache", ["usual", "none"])
def test_one_changed_number_is_refused(name: str, cache: str, tmp_path: Path) -> None:
    c = replace(PLAIN, cache=cache)
    weights = random_weights(c)
    graph = written(c, weights)
    (tensor,) = [t for t in graph.proto.graph.initializer if t.name == name]
    array = numpy_helper.to_array(tensor).copy()
    array.flat[-1] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(array, name))
    assert "Layer 1 is not proven" in str(
        refusal(tmp_path, graph.proto, random_plan(c, weights, (1,), "normed"))
    )
    # The layer before does not see the change.
    rewrite_file(
        tmp_path / "model.onnx", random_plan(c, weights, (0,), "normed"), tmp_path / "0" / "model.onnx"
    )


def test_quantized_layers_are_proven_one_by_one(tmp_path: Path) -> None:
    """Four bits are far from PyTorch's numbers, yet another layer's are farther."""
    c = replace(PLAIN, linear="MatMulNBits", width=16, layers=4)
    weights = random_weights(c)
    graph = written(c, weights)
    path, plan, result = rewritten(tmp_path, c, weights, graph, (1, 3), "normed")
    assert_computes(path, c, weights, plan)
    assert max(p.output_error for p in result.proofs.values()) > 1e-2
    y = {**plan.probe_y, 1: plan.probe_y[2]}
    assert "Layer 1 is not proven" in str(refusal(tmp_path / "again", graph.proto, replace(plan, probe_y=y)))


@pytest.mark.parametrize(
    ("attention", "cache"), [("decomposed", "usual"), ("Attention", "usual"), ("Attention", "none")]
)
def test_borrowed_keys_and_values(attention: str, cache: str, tmp_path: Path) -> None:
    """The last layer attends to the keys and values of the one before: it can go, and the other one cannot."""
    c = Choices(attention=attention, cache=cache, borrows=True)
    weights = random_weights(c)
    graph = written(c, weights)
    for layers in ((0,), (0, 1)):
        reason = refusal(tmp_path / str(layers), graph.proto, random_plan(c, weights, layers, "normed"))
        assert "layer 0: no other layer reads its keys and values (found: read by 1)" in str(reason)
    plan = random_plan(c, weights, (1,), "normed")
    path = tmp_path / "rewritten" / "model.onnx"
    rewrite_file(saved(tmp_path / "before", graph.proto), plan, path)
    assert_computes(path, c, weights, plan)


def test_what_hides_a_layer_is_named(tmp_path: Path) -> None:
    """A norm computed twice: k is projected from the second, equal one."""
    weights = random_weights(PLAIN)
    graph = written(PLAIN, weights)
    nodes = graph.proto.graph.node
    (norm,) = [n for n in nodes if "0.before.scale" in n.input]
    twin = onnx.NodeProto.FromString(norm.SerializeToString())
    twin.name, twin.output[0] = "twin", "twin"
    (projection,) = [n for n in nodes if "0.k" in n.input]
    projection.input[0] = "twin"
    nodes.insert(list(nodes).index(norm), twin)
    reason = refusal(tmp_path, graph.proto, random_plan(PLAIN, weights, (0,), "normed"))
    assert_reason(reason)
    assert "layer 0: all projections of the layer read one tensor" in str(reason)
    # It hides no other layer.
    path, plan, _ = rewritten(tmp_path, PLAIN, weights, graph, (1,), "normed")
    assert_computes(path, PLAIN, weights, plan)


# odd but valid -----------------------------------------------------------------------------------


def test_an_attention_whose_output_is_an_output_is_refused_or_rewritten(tmp_path: Path) -> None:
    weights = random_weights(PLAIN)
    graph = written(PLAIN, weights)
    (add,) = [n for n in graph.proto.graph.node if "0.o.bias" in n.input]
    graph.proto.graph.output.append(onnx.helper.make_tensor_value_info(add.output[0], 1, None))
    plan = random_plan(PLAIN, weights, (0,), "normed")
    assert add.output[0] in str(refusal(tmp_path, graph.proto, plan))


def test_a_name_of_ours_that_is_taken_is_named(tmp_path: Path) -> None:
    """As in a rewritten graph that lost its metadata."""
    weights = random_weights(PLAIN)
    graph = written(PLAIN, weights)
    _rename_tensor(graph.proto, "1.o", "layers.0.nbl_linear.weight")
    reason = refusal(tmp_path, graph.proto, random_plan(PLAIN, weights, (0,), "normed"))
    assert "layers.0.nbl_linear.weight" in str(reason)


def _rename_tensor(proto: onnx.ModelProto, old: str, new: str) -> None:
    for node in proto.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
    for tensor in proto.graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name


def test_a_bias_added_twice_is_not_left_out(tmp_path: Path) -> None:
    """Four bits are too rough to miss a small bias: without it the product alone would pass for y."""
    c = replace(PLAIN, layers=1, linear="MatMulNBits", block="post", norm="decomposed")
    weights = random_weights(c)
    graph = written(c, weights)
    (add,) = [n for n in graph.proto.graph.node if "0.o.bias" in n.input]
    first, *_ = [n for n in graph.proto.graph.node if add.output[0] in n.input]
    twin = onnx.NodeProto.FromString(add.SerializeToString())
    twin.name, twin.output[0] = "twin", "twin"
    first.input[:] = ["twin" if name == add.output[0] else name for name in first.input]
    graph.proto.graph.node.insert(list(graph.proto.graph.node).index(add), twin)
    reason = refusal(tmp_path, graph.proto, random_plan(c, weights, (0,), "normed"))
    assert "the output projection's bias is added once (found: 2 x Add)" in str(reason)
