"""What blocks save of the workload that layers are chosen for, and of weights and KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbl_export.batch.names import BASE
from nbl_export.blocks import MLP, PARTS, Block, Mlp, part_of
from nbl_export.errors import InputError
from nbl_export.progress import Listener
from nbl_export.settings import SelectSettings
from nbl_export.settings.definition import AUTO
from nbl_export.stages.build import model_positions
from nbl_export.stages.select.costs import KeptCosts
from nbl_export.stages.select.trial import trial_graph, why_not_timed

if TYPE_CHECKING:
    from nbl_export.linearize.plan import Plan, Replacement
    from nbl_export.verify.speed.savings import Savings
    from nbl_export.workspace import Workspace


@dataclass(frozen=True)
class Counting:
    """What is counted or timed: the graph of ``ws`` with candidates of ``plan``, which has no layers.

    ``kinds`` are those of attention layers by their numbers; ``layers`` makes the maps of some blocks to time.
    ``spans`` says whether spans can be chosen.
    """

    ws: Workspace
    plan: Plan
    kinds: Mapping[str, str]
    layers: Callable[[Sequence[Block]], Mapping[Block, Replacement]]
    listener: Listener
    spans: bool = False


def savings_in(of: Counting, settings: SelectSettings) -> Savings | None:
    """What blocks save in the graph that was exported, and of workloads; None where nothing asks for it.

    What was measured of the machine and of the blocks is kept in ``nbl/costs.json``, so that the same workload has the
    same costs. Raises :class:`InputError` where there is no graph, or none that runs the workload.
    """
    from nbl_export.graph.io import load_graph
    from nbl_export.verify.speed.ceiling import graph_cost
    from nbl_export.verify.speed.savings import Savings, block_savings, stored_bytes

    if not settings.workload and not settings.budget.bounds_size:
        return None
    ws = of.ws
    exported = ws.current("export")
    if exported is None or exported.dropped:
        raise InputError(
            "What each layer costs is counted in the graph, and the model is not exported yet: run "
            f"`nbl-export export {ws.root}` first."
        )
    graph, cost = load_graph(ws.baseline), graph_cost(ws.baseline)
    _check(of, settings, bool(cost.kv_bytes_per_token))
    kept = KeptCosts(ws, exported.result)
    blocks = block_savings(graph, of.plan, settings.rank)
    without = block_savings(graph, of.plan, 0) if settings.frontier or of.spans else {}
    size = stored_bytes(graph)
    counted = Savings(cost, blocks, kept.roofline(), settings.workloads, size, without=without)
    if not settings.measure_cost:
        return counted
    groups = _groups(of)
    rank = AUTO if settings.auto_rank else settings.rank
    took = kept.times(settings.workload, rank, lambda: _timed(of, settings, groups))
    return counted.timed(
        took[BASE], [(alike, linear, took[name]) for name, (alike, linear) in groups.items()]
    )


def in_words(savings: Savings) -> str:
    """What the blocks save of the workload, by their kinds."""
    parts = []
    for part, name in zip(PARTS, ("attention", "MLP"), strict=True):
        saved = [savings.saved_ms(block) for block in savings.blocks if part_of(block) == part]
        if saved:
            parts.append(f"a linear {name} saves {_span(min(saved), max(saved))} ms")
    how = "measured in the graph" if savings.measured else "counted from the graph"
    return f"Of {savings.ms():.3g} ms for the workload, {' and '.join(parts)}, {how}."


def _span(low: float, high: float) -> str:
    first, last = f"{low:.3g}", f"{high:.3g}"
    return first if first == last else f"{first} to {last}"


def _check(of: Counting, settings: SelectSettings, has_cache: bool) -> None:
    positions = model_positions(of.ws)
    for text, workload in zip(settings.workload, settings.workloads, strict=True):
        if positions is not None and workload.longest > positions:
            raise InputError(
                f"--workload {text} has {workload.longest:,} tokens in a row, and the model has {positions:,} "
                "positions: ask for fewer."
            )
        if workload.decode and not has_cache:
            raise InputError(
                f"--workload {text} decodes, and the graph has no KV cache: export it with another --kv-cache, or "
                "leave decode out."
            )


def _groups(of: Counting) -> dict[str, tuple[list[Block], list[Block]]]:
    """The blocks of each kind, and every other one of them, which is linear in the graph that is timed for it."""
    kinds: dict[str, list[Block]] = {}
    for block in of.plan.candidates:
        kind = MLP if isinstance(block, Mlp) else of.kinds.get(str(block), "")
        kinds.setdefault(kind, []).append(block)
    return {f"linear {i}": (alike, alike[::2]) for i, alike in enumerate(kinds.values())}


def _timed(
    of: Counting, settings: SelectSettings, groups: Mapping[str, tuple[list[Block], list[Block]]]
) -> dict[str, float]:
    from nbl_export.verify.speed.workloads import workload_ms

    ws, listener = of.ws, of.listener
    if why := why_not_timed(ws):
        raise InputError(f"--measure-cost cannot time the graph: {why}.")
    with ExitStack() as graphs:
        trials = {
            name: graphs.enter_context(
                trial_graph(ws, of.plan, of.layers(linear), name.replace(" ", "-"), listener)
            )
            for name, (_, linear) in groups.items()
        }
        # Where a session lies in memory costs more than a block saves: each is made anew in every round.
        return workload_ms(ws.baseline, trials, settings.workloads, listener, anew=True)
