"""What blocks save of the workload that layers are chosen for, and of weights and KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nbl_export.blocks import PARTS, part_of
from nbl_export.errors import InputError
from nbl_export.settings import SelectSettings

if TYPE_CHECKING:
    from nbl_export.linearize.plan import Plan
    from nbl_export.verify.speed.savings import Savings
    from nbl_export.workspace import Workspace


def savings_in(ws: Workspace, plan: Plan, settings: SelectSettings) -> Savings | None:
    """What blocks save in the graph that was exported, and of workloads; None where nothing asks for it.

    ``plan`` has the candidates. Raises :class:`InputError` where there is no graph.
    """
    from nbl_export.graph.io import load_graph
    from nbl_export.verify.speed.ceiling import graph_cost
    from nbl_export.verify.speed.roofline import measure_roofline
    from nbl_export.verify.speed.savings import Savings, block_savings, stored_bytes

    if not settings.workload and not settings.budget.bounds_size:
        return None
    exported = ws.current("export")
    if exported is None or exported.dropped:
        raise InputError(
            "What each layer costs is counted in the graph, and the model is not exported yet: run "
            f"`nbl-export export {ws.root}` first."
        )
    graph = load_graph(ws.baseline)
    blocks = block_savings(graph, plan, settings.rank)
    return Savings(
        graph_cost(ws.baseline), blocks, measure_roofline(), settings.workloads, stored_bytes(graph)
    )


def in_words(savings: Savings) -> str:
    """What the blocks save of the workload, by their kinds."""
    parts = []
    for part, name in zip(PARTS, ("attention", "MLP"), strict=True):
        saved = [savings.saved_ms(block) for block in savings.blocks if part_of(block) == part]
        if saved:
            parts.append(f"a linear {name} saves {_span(min(saved), max(saved))} ms")
    return f"Of {savings.ms():.3g} ms for the workload, {' and '.join(parts)}, counted from the graph."


def _span(low: float, high: float) -> str:
    first, last = f"{low:.3g}", f"{high:.3g}"
    return first if first == last else f"{first} to {last}"
