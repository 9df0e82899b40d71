"""Count what a rewrite has removed: step 4 of :mod:`.replace`."""

from __future__ import annotations

import onnx_ir as ir

from nbl_export.errors import BuildError
from nbl_export.graph.regions import find_regions
from nbl_export.graph.summary import GraphSummary
from nbl_export.linearize.plan import Plan


def count(
    model: ir.Model,
    before: GraphSummary,
    after: GraphSummary,
    plan: Plan,
    found: int | None = None,
    pairs: int | None = None,
) -> None:
    """Raises :class:`BuildError` unless exactly the planned changes were made.

    ``found`` is the number of attention layers before the rewrite, ``pairs`` that of the KV pairs of the plan's layers;
    None means the candidates of the plan, and one for each of its layers if there are any.
    """
    k = len(plan.linear_attention)
    cached = pairs if pairs is not None else k if before.kv_pairs else 0
    regions = len(find_regions(model))
    expected = {
        "attention layers": (regions, len(plan.attention_layers) if found is None else found - k),
        "KV pairs": (after.kv_pairs, before.kv_pairs - cached),
        "inputs": (after.inputs, before.inputs - 2 * cached),
        "outputs": (after.outputs, before.outputs - 2 * cached),
        "dead initializers": (sum(not v.uses() for v in model.graph.initializers.values()), 0),
        "dead nodes": (sum(not _is_read(node) for node in model.graph), 0),
    }
    for what, (has, wanted) in expected.items():
        if has != wanted:
            raise BuildError(
                f"The rewritten graph has {has} {what}, expected {wanted}, so it is discarded: report this bug of "
                "nbl-export."
            )


def _is_read(node: ir.Node) -> bool:
    return any(v.uses() or v.is_graph_output() for v in node.outputs)
