"""Prove a mixture of experts: the routers of a graph are told what PyTorch's have chosen on the probe.

    before                              told which experts
    scores ─► TopK ─┬► values           scores ─► GatherElements ─► values
                    └► places           places ──┘ (fed)  ─► places

Where rounding sends one token to another expert, its stream is another one, and no longer says whether the graph is of
the plan's model. So the graph is run with PyTorch's choices, and each choice is judged by itself: the graph's own score
for it may fall short of those that it prefers by no more than rounding moves a score of that router.

A mixture in one node (``MoE``, ``QMoE``) chooses by itself. It is given the scores of the k largest alone, and the
smallest number for the others, which it does not choose: what it computes stays the same, and its router is a TopK.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch import moved, shortfall
from nbl_export.errors import BuildError
from nbl_export.graph.io import load_graph
from nbl_export.graph.nodes import Nodes
from nbl_export.graph.operators import MIXTURES, infer_types, int_attribute, int_input, key, upstream

# Of the scores' size, beside what is measured.
_FLOAT32 = 1e-3
# Less than any score, also in half precision.
_LEAST = -6e4
# The input of a mixture with the weights of its experts, where these are not made of the scores.
_WEIGHTS = 14


def load_routed(path: Path) -> ir.Model:
    """The graph at ``path``; every mixture in it is told by a TopK which experts to take."""
    model = load_graph(path)
    for node in [n for n in model.graph if _chooses(n)]:
        _choose_before(node)
    return model


def is_routed(model: ir.Model) -> bool:
    """Whether ``model`` sends tokens to experts."""
    return bool(routers(model)) or any(_chooses(node) for node in model.graph)


def routers(model: ir.Model) -> list[ir.Node]:
    """The operators that take the largest scores [tokens, …, n], in the order in which the model runs."""
    return [node for node in model.graph if node.op_type == "TopK" and not node.domain]


def _chooses(node: ir.Node) -> bool:
    """Whether ``node`` is a mixture that takes the largest of its scores, and was not given a choice."""
    if key(node) not in MIXTURES or int_attribute(node, "use_sparse_mixer"):
        return False
    makers = (value.producer() for value in upstream(node.inputs[1]))
    first = next((m for m in makers if m is None or m.op_type != "Cast"), None)
    return first is None or first.op_type != "ScatterElements"


def _choose_before(node: ir.Node) -> None:
    scores, y = node.inputs[1], node.outputs[0]
    assert scores is not None
    make = Nodes(f"{y.name}.router")
    values = make("TopK", scores, make.number([int_attribute(node, "k", 1)]), outputs=2, dtype=scores.dtype)
    places = make.made[-1].outputs[1]
    values.shape, places.type = scores.shape, ir.TensorType(ir.DataType.INT64)
    least = make("Expand", make.number(_LEAST, np.float32), make("Shape", scores, dtype=places.dtype))
    least = make("CastLike", least, scores, dtype=scores.dtype)
    told = make("ScatterElements", least, places, values, axis=-1, dtype=scores.dtype)
    node.replace_input_with(1, told)
    node.prepend(make.made)
    if int_attribute(node, "normalize_routing_weights") or len(node.inputs) > _WEIGHTS:
        return
    # The weights are shares of all experts, and would be shares of those that are taken.
    node.attributes["normalize_routing_weights"] = ir.AttrInt64("normalize_routing_weights", 1)
    make, uses = Nodes(f"{y.name}.shares"), list(y.uses())
    shares = make(
        "GatherElements", make("Softmax", scores, dtype=scores.dtype), places, axis=-1, dtype=scores.dtype
    )
    total = make("ReduceSum", shares, make.number([-1]), dtype=scores.dtype)
    shape = make(
        "Concat", make("Shape", y, end=-1, dtype=places.dtype), make.number([1]), axis=0, dtype=places.dtype
    )
    result = make("Mul", y, make("Reshape", total, shape, dtype=scores.dtype), dtype=scores.dtype)
    for use in uses:
        use.node.replace_input_with(use.idx, result)
    node.append(make.made)


def places_of(router: ir.Node) -> str:
    """The name of the places [tokens, …, k] that are taken."""
    return str(router.outputs[1].name)


def told_ranks(model: ir.Model, routes: Mapping[int, NDArray[np.int64]]) -> dict[str, int]:
    """The rank of the places of each router by name, if all can be told ``routes`` by their numbers; else nothing.

    ``routes`` are places [tokens, …, k]; in the graph they may have a dimension for the batch before. Raises
    :class:`BuildError` for a router that takes another number of experts.
    """
    found = routers(model)
    if set(routes) != set(range(len(found))):
        return {}
    infer_types(model)
    ranks: dict[str, int] = {}
    for number, node in enumerate(found):
        shape = node.inputs[0].shape if node.inputs[0] is not None else None
        rank = len(shape or ())
        if rank - routes[number].ndim not in (0, 1) or int_attribute(node, "axis", -1) % rank != rank - 1:
            return {}
        k, expected = int_input(node, 1), routes[number].shape[-1]
        if k not in (None, expected):
            raise BuildError(
                f"The graph is not proven: its router {number} takes {k} experts of a token, PyTorch's {expected}; "
                "this graph is not of the model the plan was made for: export that model."
            )
        ranks[places_of(node)] = rank
    return ranks


def tell(model: ir.Model) -> None:
    """Make every router weigh the places that are fed to it by its own scores, in place."""
    for node in routers(model):
        values, places = node.outputs
        gather = ir.node("GatherElements", [node.inputs[0], places], {"axis": -1})
        made = gather.outputs[0]
        made.name, made.type, made.shape = f"{values.name}.told", values.type, values.shape
        ir.convenience.replace_all_uses_with(values, made)
        node.append(gather)


def told_scores(model: ir.Model, routes: Mapping[int, NDArray[np.int64]]) -> list[str]:
    """Names of the scores of each router of the graph; none if one cannot be told the ``routes``."""
    if not routes or not told_ranks(model, routes):
        return []
    return [str(node.inputs[0].name) for node in routers(model) if node.inputs[0] is not None]


def shortfalls(
    names: Sequence[str],
    routes: Mapping[int, NDArray[np.int64]],
    own: Sequence[Mapping[str, NDArray[np.float32]]],
    draws: Sequence[Sequence[Mapping[str, NDArray[np.float32]]]] = (),
    room: float = 1.0,
) -> list[tuple[float, float]]:
    """How far the scores of PyTorch's choices fall short in each router, and how far they may.

    Routers are known by their scores ``names`` in the graph's ``own`` run and where rounding has moved them.
    """
    pairs = []
    for number, name in enumerate(names):
        taken = routes[number]
        found, *others = (
            np.concatenate([r[name][0] if r[name].ndim > taken.ndim else r[name] for r in run]).astype(
                np.float32
            )
            for run in (own, *draws)
        )
        size = float(np.sqrt(np.mean(np.where(np.isfinite(found), found, 0.0) ** 2)))
        by_rounding = max((moved(found, other) for other in others), default=0.0)
        short = float(shortfall(found, taken).max(initial=0.0))
        pairs.append((short, max(room * by_rounding, _FLOAT32 * size)))
    return pairs
