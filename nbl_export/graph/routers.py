"""The routers of a mixture of experts in a graph: where the k largest scores of each token are taken.

before                              told which experts
scores ─► TopK ─┬► values           scores ─► GatherElements ─► values
                └► places           places ──┘ (fed)  ─► places
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.graph.operators import int_attribute
from nbl_export.graph.types import infer_types


def routers(model: ir.Model) -> list[ir.Node]:
    """The operators that take the largest scores, in the order in which the model runs."""
    return [node for node in model.graph if node.op_type == "TopK" and not node.domain]


def scores_of(router: ir.Node) -> str:
    """The name of the scores [tokens, …, n]."""
    assert router.inputs[0] is not None
    return str(router.inputs[0].name)


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
        scores = node.inputs[0]
        rank = 0 if scores is None or scores.shape is None else len(scores.shape)
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
