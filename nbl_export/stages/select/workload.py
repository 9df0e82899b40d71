"""Count what blocks save of the workload that layers are chosen for, and of weights and KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from nbl_export.blocks import PARTS, Block, Span, part_of
from nbl_export.errors import InputError
from nbl_export.files import read_sealed, write_sealed
from nbl_export.records import from_json, to_json
from nbl_export.settings import SelectSettings
from nbl_export.stage_record import STAGES
from nbl_export.stages.build import model_positions

if TYPE_CHECKING:
    from nbl_export.linearize.plan import Plan
    from nbl_export.verify.speed.savings import Savings
    from nbl_export.verify.speed.values import Roofline
    from nbl_export.workspace import Workspace


def savings_in(
    ws: Workspace, plan: Plan, candidates: Iterable[Block], settings: SelectSettings
) -> Savings | None:
    """What ``candidates`` save in the graph that was exported, and of workloads; None where nothing asks for it.

    ``plan`` has no layers. Raises :class:`InputError` where there is no graph, or none that runs the workload.
    """
    from nbl_export.graph.io import load_graph
    from nbl_export.verify.speed.ceiling import graph_cost
    from nbl_export.verify.speed.savings import Savings, block_savings, stored_bytes

    if not settings.workload and not settings.budget.bounds_size:
        return None
    exported = ws.current("export")
    if exported is None or exported.dropped:
        raise InputError(
            "What each layer costs is counted in the graph, and the model is not exported yet: run "
            f"`nbl-export export {ws.root}` first."
        )
    graph, cost = load_graph(ws.baseline), graph_cost(ws.baseline)
    positions = model_positions(ws)
    for text, workload in zip(settings.workload, settings.workloads, strict=True):
        if positions is not None and workload.longest > positions:
            raise InputError(
                f"--workload {text} has {workload.longest:,} tokens in a row, and the model has {positions:,} "
                "positions: ask for fewer."
            )
        if workload.decode and not cost.kv_bytes_per_token:
            raise InputError(
                f"--workload {text} decodes, and the graph has no KV cache: export it with another --kv-cache, or "
                "leave decode out."
            )
    blocks = block_savings(graph, plan, settings.rank)
    spans = any(isinstance(block, Span) for block in candidates)
    without = block_savings(graph, plan, 0) if spans else {}
    return Savings(cost, blocks, _roofline(ws), settings.workloads, stored_bytes(graph), without=without)


def _roofline(ws: Workspace) -> Roofline:
    """That of this machine, measured once for a folder: the same workload then has the same costs."""
    from nbl_export.report.schema import environment
    from nbl_export.verify.speed.roofline import measure_roofline
    from nbl_export.verify.speed.values import Roofline

    here = environment()
    machine = {"processor": here.processor, "cores": here.cores, "version": STAGES["select"]}
    try:
        kept = read_sealed(ws.costs, "The file of costs", "")
        if kept["machine"] == machine:
            return from_json(Roofline, kept["roofline"], "The file of costs", "")
    except (InputError, KeyError, TypeError):
        pass  # it is not there, or damaged
    found = measure_roofline()
    write_sealed(ws.costs, {"machine": machine, "roofline": to_json(found)})
    return found


def in_words(savings: Savings) -> str:
    """What the blocks save of the workload, by their kinds."""
    parts = []
    for part, name in zip(PARTS, ("attention", "MLP"), strict=True):
        saved = [savings.saved_ms(block) for block in savings.blocks if part_of(block) == part]
        if saved:
            first, last = f"{min(saved):.3g}", f"{max(saved):.3g}"
            parts.append(f"a linear {name} saves {first if first == last else f'{first} to {last}'} ms")
    return f"Of {savings.ms():.3g} ms for the workload, {' and '.join(parts)}, counted from the graph."
