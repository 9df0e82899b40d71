"""Prove a mixture of experts: the routers of a graph are told what PyTorch's have chosen on the probe.

    before                              told which experts
    scores ─► TopK ─┬► values           scores ─► GatherElements ─► values
                    └► places           places ──┘ (fed)  ─► places

Where rounding sends one token to another expert, its stream is another one, and no longer says whether the graph is of
the plan's model. So the graph is run with PyTorch's choices, and each choice is judged by itself: the graph's own score
for it may fall short of those that it prefers by no more than rounding moves a score of that router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch import moved, shortfall
from nbl_export.graph.operators import infer_types, int_attribute

# Of the scores' size, beside what is measured.
_FLOAT32 = 1e-3


def routers(model: ir.Model) -> list[ir.Node]:
    """The operators that take the largest scores [tokens, …, n], in the order in which the model runs."""
    return [node for node in model.graph if node.op_type == "TopK" and not node.domain]


def places_of(router: ir.Node) -> str:
    """The name of the places [tokens, …, k] that are taken."""
    return str(router.outputs[1].name)


def told_ranks(model: ir.Model, routes: Mapping[int, NDArray[np.int64]]) -> dict[str, int]:
    """The rank of the places of each router by name, if all can be told ``routes`` by their numbers; else nothing.

    ``routes`` are places [tokens, …, k]; in the graph they may have a dimension for the batch before.
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
