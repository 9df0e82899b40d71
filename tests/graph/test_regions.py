"""Where the attention of every layer is found: against PyTorch's own activations, and in odd graphs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from nbl_export.blocks import Block, Mlp
from nbl_export.export.forms import CONCAT
from nbl_export.export.torch import export_torch, tidy
from nbl_export.graph.branches import find_branches, mlp_regions
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.regions import Refusal, Region, find_regions
from nbl_export.models.dummy_run import dummy_run
from tests import tiny_types
from tests.fixtures_graph import (
    intermediate_tensors,
    pad_left,
    ragged_rows,
)

_SIZES = {
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
        model = Qwen2ForCausalLM(Qwen2Config(**_SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(**_SIZES, attention_bias=kind == "llama with biases"))
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


def activations(
    model: Any, inputs: dict[str, Any], norm: str = "input_layernorm", part: str = "self_attn.o_proj"
) -> list[dict[str, Any]]:
    """h, x and y of every attention, by hooks on the modules of a Llama-like model, real tokens only."""
    kept, layer = inputs["attention_mask"].astype(bool), "model.layers.{}."
    with torch.inference_mode(), tiny_types.activations(model, layer + norm, layer + part) as seen:
        model(**{k: torch.from_numpy(v) for k, v in inputs.items()}, use_cache=False)
    return [{name: passes[0].numpy()[kept] for name, passes in found.items()} for found in seen]


def assert_regions_are_the_attention(path: Path, model: Any, layers: int, core: str) -> None:
    vocab = model.config.vocab_size
    ids, mask, positions = pad_left(ragged_rows((9, 5, 7), vocab))
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    expected = activations(model, inputs)
    regions = find_regions(load_graph(path))
    assert [r.layer for r in regions] == list(range(layers))
    for region, wanted in zip(regions, expected, strict=True):
        assert isinstance(region, Region), str(region)
        assert region.core == core
        assert region.streams
        names = {
            "h": str(region.streams[0].name),
            "x": str(region.inputs[0].name),
            "y": str(region.outputs[0].value.name),
        }
        assert len(set(names.values())) == 3
        found = intermediate_tensors(path, list(names.values()), inputs)
        for what, name in names.items():
            got = found[name][mask.astype(bool)]
            np.testing.assert_allclose(got, wanted[what], rtol=2e-4, atol=2e-4, err_msg=f"{what} of {region}")
    # What is compared really differs from layer to layer, so a shifted answer would be noticed.
    for what in ("h", "x", "y"):
        first, last = expected[0][what], expected[-1][what]
        assert np.abs(first - last).max() > 0.1


def test_variants(variant: Variant) -> None:
    """Biases belong to y; without the fused operator the core is the product with V."""
    assert_regions_are_the_attention(variant.path, variant.model, 2, variant.core)
    model = load_graph(variant.path)
    for region in find_regions(model):
        assert isinstance(region, Region)
        producer = region.outputs[0].value.producer()
        assert producer is not None and producer.op_type == variant.writer
    ops = {node.op_type for node in model.graph}
    assert ("Attention" in ops) != ("Softmax" in ops)
    assert ("Softmax" in ops) == (variant.kind == "decomposed llama")


# Graphs made by hand -----------------------------------------------------------------------------

D, VOCAB = 8, 11
Node = tuple[str, list[str], list[str]]
ONE_LAYER: dict[str, Node] = {
    "embed": ("Gather", ["embedding", "input_ids"], ["h"]),
    "norm": ("RMSNormalization", ["h", "gain"], ["x"]),
    "q": ("MatMul", ["x", "w.q"], ["q3"]),
    "k": ("MatMul", ["x", "w.k"], ["k3"]),
    "v": ("MatMul", ["x", "w.v"], ["v3"]),
    "q4": ("Unsqueeze", ["q3", "one"], ["q"]),
    "k4": ("Unsqueeze", ["k3", "one"], ["k"]),
    "v4": ("Unsqueeze", ["v3", "one"], ["v"]),
    "keys": ("Concat", ["past_key_values.0.key", "k"], ["present.0.key"]),
    "values": ("Concat", ["past_key_values.0.value", "v"], ["present.0.value"]),
    "core": ("Attention", ["q", "present.0.key", "present.0.value"], ["a"]),
    "flat": ("Squeeze", ["a", "one"], ["a3"]),
    "o": ("MatMul", ["a3", "w.o"], ["y"]),
    "add": ("Add", ["h", "y"], ["out"]),
    "head": ("MatMul", ["out", "w.head"], ["logits"]),
}


def one_layer(changes: dict[str, Node | None]) -> ir.Model:
    """A decoder of one attention layer with one head; ``changes`` replace, add or drop nodes."""
    nodes = {k: v for k, v in (ONE_LAYER | changes).items() if v is not None}
    shapes = {
        "embedding": (VOCAB, D),
        "gain": (D,),
        **{f"w.{m}": (D, D) for m in ("q", "k", "v", "o", "o2")},
        "w.head": (D, VOCAB),
    }
    generator = np.random.default_rng(0)
    arrays = {n: generator.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    arrays["one"] = np.array([1], dtype=np.int64)
    used = {name for _, inputs, _ in nodes.values() for name in inputs}
    attributes = {"Concat": {"axis": 2}, "Cast": {"to": TensorProto.FLOAT}}

    def value(name: str, *shape: str | int) -> onnx.ValueInfoProto:
        kind = TensorProto.INT64 if name == "input_ids" else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    sides = ("key", "value")
    graph = helper.make_graph(
        [helper.make_node(op, i, o, n, **attributes.get(op, {})) for n, (op, i, o) in nodes.items()],
        "decoder",
        [
            value("input_ids", "batch", "sequence"),
            *(value(f"past_key_values.0.{s}", "batch", 1, "past", D) for s in sides),
        ],
        [
            value("logits", "batch", "sequence", VOCAB),
            *(value(f"present.0.{s}", "batch", 1, "total", D) for s in sides),
        ],
        [numpy_helper.from_array(a, n) for n, a in arrays.items() if n in used],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    model = ir.from_proto(proto)
    model.graph.sort()
    onnx.checker.check_model(ir.to_proto(model))
    return model


IDENTITIES: dict[str, Node | None] = {
    f"id{i}": ("Identity", [f"i{i - 1}" if i else "a3"], [f"i{i}"]) for i in range(13)
}


@pytest.mark.parametrize(
    ("changes", "check", "found"),
    [
        pytest.param(
            {**IDENTITIES, "o": None, "add": ("Add", ["h", "i12"], ["out"])},
            "an output projection follows the attention",
            "Identity after 12 nodes",
            id="no output projection",
        ),
        pytest.param(
            {
                "o": None,
                "add": ("Add", ["h", "a3"], ["out"]),
                "act": ("Tanh", ["out"], ["t"]),
                "sum": ("Add", ["out", "t"], ["s"]),
                "head": ("MatMul", ["s", "w.head"], ["logits"]),
            },
            "an output projection comes before the residual addition",
            "an Add of two activations",
            id="the result goes into the stream unprojected",
        ),
        pytest.param(
            {
                "o2": ("MatMul", ["a3", "w.o2"], ["y2"]),
                "both": ("Add", ["y", "y2"], ["yy"]),
                "add": ("Add", ["h", "yy"], ["out"]),
            },
            "the attention's result has one reader up to the output projection",
            "2",
            id="two output projections",
        ),
        pytest.param(
            {"k": ("MatMul", ["h", "w.k"], ["k3"])},
            "all projections of the layer read one tensor",
            "h, x",
            id="q and k read different tensors",
        ),
        pytest.param(
            {"head": ("MatMul", ["h", "w.head"], ["logits"]), "o": None, "add": None, "flat": None},
            "the past key and value reach the first output",
            "no path",
            id="the attention does not reach the logits",
        ),
        pytest.param(
            {"core": ("Attention", ["q", "present.0.key", "v"], ["a"])},
            "the past key and value reach the first output",
            "no path",
            id="the past value does not reach the logits",
        ),
    ],
)
def test_refusals_say_what_was_checked_and_found(
    changes: dict[str, Node | None], check: str, found: str
) -> None:
    (entry,) = find_regions(one_layer(changes))
    assert entry == Refusal(0, check, found, pair=0)
    assert str(entry) == f"layer 0: {check} (found: {found})"


def test_asking_a_cache_for_its_size_is_not_a_path() -> None:
    """Exporters ask a cache for the past length; none of its numbers flow from there to the logits."""
    (entry,) = find_regions(
        one_layer(
            {
                "core": ("Attention", ["q", "present.0.key", "v"], ["a"]),
                "size": ("Size", ["past_key_values.0.value"], ["n"]),
                "float": ("Cast", ["n"], ["f"]),
                "shift": ("Add", ["a3", "f"], ["a3s"]),
                "o": ("MatMul", ["a3s", "w.o"], ["y"]),
            }
        )
    )
    assert entry == Refusal(0, "the past key and value reach the first output", "no path", pair=0)


# After the attention of ONE_LAYER: a gated MLP.
MLP: dict[str, Node] = {
    "norm2": ("RMSNormalization", ["out", "gain"], ["x2"]),
    "gate": ("MatMul", ["x2", "w.q"], ["g"]),
    "up": ("MatMul", ["x2", "w.k"], ["u"]),
    "act": ("Sigmoid", ["g"], ["s"]),
    "mul": ("Mul", ["s", "u"], ["m"]),
    "down": ("MatMul", ["m", "w.o2"], ["y2"]),
    "add2": ("Add", ["out", "y2"], ["out2"]),
    "head": ("MatMul", ["out2", "w.head"], ["logits"]),
}


def found_in(changes: dict[str, Node | None], candidates: tuple[Block, ...] = (0, Mlp(0))) -> Any:
    model = one_layer({**MLP, **changes})
    return mlp_regions(model, find_regions(model), candidates, 1)


def test_u_y_and_h_of_every_mlp_are_among_the_candidates(variant: Variant) -> None:
    count = len(variant.model.model.layers)
    ids, mask, positions = pad_left(ragged_rows((9, 5, 7), variant.model.config.vocab_size))
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    model = load_graph(variant.path)
    blocks: list[Block] = [block for i in range(count) for block in (i, Mlp(i))]
    regions = mlp_regions(model, find_regions(model), blocks, count)
    assert [region.layer for region in regions] == blocks[1::2]
    real = mask.astype(bool)
    expected = activations(variant.model, inputs, "post_attention_layernorm", "mlp")
    for region, wanted in zip(regions, expected, strict=True):
        assert isinstance(region, Region), str(region)
        assert region.streams and len(region.linear_nodes) == 3
        assert region.projection is region.linear_nodes[-1]
        values = {"h": region.streams, "x": region.inputs, "y": [o.value for o in region.outputs]}
        names = [str(v.name) for found in values.values() for v in found]
        found = intermediate_tensors(variant.path, names, inputs)
        for what, candidates in values.items():
            errors = [
                float(np.abs(got[real] - wanted[what]).max())
                for v in candidates
                if (got := found[str(v.name)]).shape[-1] == wanted[what].shape[-1] and got.ndim == 3
            ]
            assert min(errors) < 2e-4, (what, errors)


def test_a_gated_mlp() -> None:
    (region,) = found_in({})
    assert (region.inputs[0].name, region.outputs[0].value.name, region.streams[0].name) == (
        "x2",
        "y2",
        "out",
    )
    assert [node.name for node in region.linear_nodes] == ["gate", "up", "down"]
    assert region.style == "decomposed" and region.pair is None


def test_beside_the_attention() -> None:
    """Both read one norm, and one sum of both is added to the stream."""
    for order in (["y", "y2"], ["y2", "y"]):
        (region,) = found_in(
            {
                "norm2": None,
                "gate": ("MatMul", ["x", "w.q"], ["g"]),
                "up": ("MatMul", ["x", "w.k"], ["u"]),
                "add": ("Add", order, ["both"]),
                "add2": ("Add", ["both", "h"], ["out2"]),
            }
        )
        assert (region.inputs[0].name, region.outputs[0].value.name) == ("x", "y2")
    (region,) = found_in(
        {
            "norm2": None,
            "gate": ("MatMul", ["x", "w.q"], ["g"]),
            "up": ("MatMul", ["x", "w.k"], ["u"]),
            "add2": ("Add", ["out", "y2"], ["out2"]),
        }
    )
    assert (region.inputs[0].name, region.outputs[0].value.name) == ("x", "y2")


def test_experts_and_a_shared_one_are_one_mlp() -> None:
    (region,) = found_in(
        {
            "route": ("MatMul", ["x2", "w.v"], ["r"]),
            "weigh": ("Mul", ["y2", "r"], ["routed"]),
            "shared": ("MatMul", ["x2", "w.o"], ["own"]),
            "sum": ("Add", ["routed", "own"], ["y3"]),
            "add2": ("Add", ["out", "y3"], ["out2"]),
        }
    )
    assert region.inputs[0].name == "x2"
    assert "y3" in {o.value.name for o in region.outputs}


def test_a_layer_without_an_mlp_is_refused() -> None:
    (refusal,) = found_in(dict.fromkeys(MLP) | {"head": ONE_LAYER["head"]})
    assert isinstance(refusal, Refusal) and refusal.layer == Mlp(0)
    assert "adds its attention and its MLP to one stream" in str(refusal)


def test_other_mixers_of_tokens_are_told_from_mlps_by_their_place() -> None:
    """Layer 0 has an MLP and no attention; layer 1 has both."""
    model = one_layer(
        {
            "mixer": ("MatMul", ["h", "w.v"], ["mixed"]),
            "after": ("Add", ["h", "mixed"], ["h1"]),
            "ff": ("MatMul", ["h1", "w.o2"], ["ff1"]),
            "ffadd": ("Add", ["h1", "ff1"], ["h2"]),
            "norm": ("RMSNormalization", ["h2", "gain"], ["x"]),
            "add": ("Add", ["h2", "y"], ["out"]),
            **MLP,
        }
    )
    (attention,) = find_regions(model)
    assert isinstance(attention, Region)
    moved = Region(**{**vars(attention), "layer": 1})
    assert [b if isinstance(b, int) else None for b in find_branches(model, [moved])] == [None, None, 1, None]
    found = mlp_regions(model, [moved], (1, Mlp(0), Mlp(1)), 2)
    assert [(r.layer, r.outputs[0].value.name) for r in found if isinstance(r, Region)] == [
        (Mlp(0), "ff1"),
        (Mlp(1), "y2"),
    ]
