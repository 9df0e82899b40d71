"""What lies on the residual stream beside attention: against PyTorch's own activations, and in odd graphs."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbl_export.blocks import Block, Mlp
from nbl_export.graph.branches import find_branches, mlp_regions
from nbl_export.graph.io import load_graph
from nbl_export.graph.regions import AttentionRegion, MlpRegion, Refusal, find_regions
from nbl_export.runtime.intermediates import intermediate_tensors
from tests.fixtures_graph import pad_left, ragged_rows
from tests.graph.test_regions import ONE_LAYER, Node, activations, one_layer
from tests.variants import Variant

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
        assert isinstance(region, MlpRegion), str(region)
        assert region.h is not None and len(region.linear_nodes) == 3
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
    assert (region.x.name, region.y.name, region.h.name) == ("x2", "y2", "out")
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
        assert (region.x.name, region.y.name) == ("x", "y2")
    (region,) = found_in(
        {
            "norm2": None,
            "gate": ("MatMul", ["x", "w.q"], ["g"]),
            "up": ("MatMul", ["x", "w.k"], ["u"]),
            "add2": ("Add", ["out", "y2"], ["out2"]),
        }
    )
    assert (region.x.name, region.y.name) == ("x", "y2")


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
    assert region.x.name == "x2"
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
    assert isinstance(attention, AttentionRegion)
    moved = AttentionRegion(**{**vars(attention), "layer": 1})
    assert [branch.attention for branch in find_branches(model, [moved])] == [None, None, 1, None]
    found = mlp_regions(model, [moved], (1, Mlp(0), Mlp(1)), 2)
    assert [(r.layer, r.y.name) for r in found if isinstance(r, MlpRegion)] == [
        (Mlp(0), "ff1"),
        (Mlp(1), "y2"),
    ]
