"""Make the plan from the moments: score the layers, choose some by what they cost and save, fit, repair, truncate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nbl_export.blocks import ATTENTION, PARTS, Block, Span, part_of
from nbl_export.calibrate.probe import load_probe
from nbl_export.errors import InputError
from nbl_export.files import read_sealed, write_json, write_sealed
from nbl_export.graph.io import load_graph
from nbl_export.linearize.plan import Plan, load_plan, ranks_of, save_plan
from nbl_export.linearize.scores import check_selection, predicted_excess, score_layers
from nbl_export.linearize.selection import Curve, PlanLoss, ScoredLayer, Scores
from nbl_export.models.layers import FULL
from nbl_export.models.load import exact_float32
from nbl_export.progress import Listener, Silent
from nbl_export.ranks import ALONE
from nbl_export.records import STAGES, from_json, to_json
from nbl_export.report.schema import environment
from nbl_export.settings import SelectSettings
from nbl_export.stages.choosing import Choosing, Shipped
from nbl_export.stages.measuring import Measuring
from nbl_export.stages.run import Run, model_positions, opened
from nbl_export.verify.speed.ceiling import Savings, block_savings, graph_cost, measure_roofline, stored_bytes
from nbl_export.verify.speed.values import Roofline
from nbl_export.workspace import Workspace


def select(
    out: str | Path | Run,
    settings: SelectSettings,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Plan:
    """Score every layer, choose K of them, and save their W and b with the evidence for the proof; returns the plan."""
    with opened(out, settings, listener, trust_remote_code, rehash, several=True) as (run, asked):
        ws, ranks = run.workspace, run.ranks
        calibrated = ranks.shared(lambda: ws.require("calibrate"))
        made_of, device = {"calibrate": calibrated.result}, run.on(asked.device)
        if not ranks.first:
            with Measuring(run, calibrated.result, asked, Silent()) as own, exact_float32():
                ranks.follow(lambda: own.jobs)
            return load_plan(ws.plan)
        with ranks.leading():
            if asked.reads_graph:
                made_of["export"] = ws.require("export").result
            with replace(run, ranks=ALONE).stage("select", asked.as_json(), made_of, device) as work:
                if work:
                    with Measuring(run, calibrated.result, asked, work) as measuring:
                        work.files = make_plan(measuring)
        return load_plan(ws.plan)


def make_plan(of: Measuring) -> list[Path]:
    """Choose and fit; the files of the plan and of what was found."""
    run, settings, listener, moments, metadata = of.run, of.settings, of.listener, of.moments, of.metadata
    ws, others, kinds = run.workspace, metadata.get("others", {}), metadata.get("kinds", {})
    width = None if settings.rank is None else len(next(iter(moments.values())).x)
    check_selection(settings, list(moments), width, others)
    candidates = score_layers(moments, of.fitting.scoring_ridge, listener, of.scores, run.ranks.count)
    empty = _without_layers(of)
    savings = _savings(of, empty)

    def ship(layers: Sequence[Block]) -> Shipped:
        predicted = None if settings.layers is not None else predicted_excess(candidates, layers)
        return _fitted(of, empty, layers, predicted)

    curve: Curve | None = None
    kl_tokens: int | None = None
    if settings.layers is not None:
        plan, result = ship(sorted(settings.layers))
    else:
        if savings and settings.workload:
            listener.note(_in_words(savings))
        choosing = Choosing(of, empty, savings)
        candidates = choosing.scored(candidates)
        if any(c.kl is not None for c in candidates):
            kl_tokens = choosing.kl_tokens
        (plan, result), curve = choosing.choose(candidates, ship)
        candidates = choosing.judged_stable(candidates, plan.chosen)
    save_plan(ws.plan, plan)
    ws.repair_checkpoint.unlink(missing_ok=True)
    scored = tuple(
        ScoredLayer(**vars(c), kind=kinds.get(str(c.layer), FULL if part == ATTENTION else part))
        for c in candidates
        for part in [part_of(c.layer)]
    )
    workload_ms = savings.ms() if savings and settings.workload else None
    dtype = metadata.get("dtype")
    raw = to_json(Scores(scored, others, curve, result, dtype, settings.workload, workload_ms, kl_tokens))
    if raw["result"]:  # of which only what was measured
        raw["result"] = {name: value for name, value in raw["result"].items() if value is not None}
    write_json(ws.candidates, raw)
    return [ws.plan, ws.plan.with_suffix(".safetensors"), ws.candidates]


def _fitted(of: Measuring, empty: Plan, chosen: Sequence[Block], predicted: float | None) -> Shipped:
    """The plan of the chosen layers, and its loss on the selection text.

    The loss of a decoder is measured if it is not known from the choice of layers, or if it was only ``predicted`` (the
    excess, in nats).
    """
    settings, decoder = of.settings, of.run.model.task.causal
    layers = of.fitting.final(chosen)
    plan = empty.with_replaced(layers)
    if not chosen:
        return plan, None
    result = PlanLoss(predicted_excess=predicted)
    if settings.repair:
        result = replace(result, before_repair=of.loss_of(plan))
        repaired = of.fitting.repaired(layers)
        layers = {**repaired.layers}
        plan = replace(plan.with_replaced(layers), adapters=repaired.adapters)
    if settings.truncates:
        if decoder:
            result = replace(result, before_rank=of.loss_of(plan))
        layers, lost = of.fitting.truncated(layers)
        plan = plan.with_replaced(layers)
        if settings.rank is None:
            plan = replace(plan, ranks=ranks_of(plan.layers))
            result = replace(result, ranks={str(layer): rank for layer, rank in plan.ranks.items()})
        result = replace(result, rank_lost={str(layer): share for layer, share in lost.items()})
    if decoder and (result != PlanLoss() or settings.fit == "sequential"):
        result = replace(result, loss=of.loss_of(plan))
    return plan, result if result != PlanLoss() else None


def _without_layers(of: Measuring) -> Plan:
    """A plan that replaces nothing yet."""
    settings, probe = of.settings, load_probe(of.run.workspace.probe)
    return Plan(
        model=of.run.model.source.fingerprint,
        hidden_size=next(iter(probe.y.values())).shape[1],
        layer_count=of.metadata.get("blocks", len(probe.y)),
        fit_input=settings.fit_input,
        criterion=str(settings.criterion) if settings.layers is None else "by hand",
        ridge=settings.ridge,
        calibration_tokens=of.metadata["tokens"],
        layers={},
        probe=dict(probe.inputs),
        probe_u=probe.x if settings.fit_input == "normed" else probe.h,
        probe_y=probe.y,
        fit=settings.fit,
        repair=settings.repair,
        rank=settings.rank,
        probe_routes=probe.routes,
    )


# what blocks save --------------------------------------------------------------------------------


def _savings(of: Measuring, plan: Plan) -> Savings | None:
    """What candidates save in the graph that was exported, and of workloads; None where nothing asks for it.

    ``plan`` has no layers. Raises :class:`InputError` where there is no graph, or none that runs the workload.
    """
    ws, settings = of.run.workspace, of.settings
    if not settings.workload and not settings.budget.bounds_size:
        return None
    exported = ws.current("export")
    if exported is None or exported.dropped:
        raise InputError(
            "What each layer costs is counted in the graph, and the model is not exported yet: run "
            f"`nbl-export export {ws.root}` first."
        )
    graph, cost, limit = load_graph(ws.baseline), graph_cost(ws.baseline), model_positions(ws)
    for text, workload in zip(settings.workload, settings.workloads, strict=True):
        if limit is not None and workload.longest > limit:
            raise InputError(
                f"--workload {text} has {workload.longest:,} tokens in a row, and the model has {limit:,} positions: "
                "ask for fewer."
            )
        if workload.decode and not cost.kv_bytes_per_token:
            raise InputError(
                f"--workload {text} decodes, and the graph has no KV cache: export it with another --kv-cache, or "
                "leave decode out."
            )
    blocks = block_savings(graph, plan, settings.rank)
    without = block_savings(graph, plan, 0) if any(isinstance(block, Span) for block in of.moments) else {}
    return Savings(cost, blocks, _roofline(ws), settings.workloads, stored_bytes(graph), without=without)


def _roofline(ws: Workspace) -> Roofline:
    """That of this machine, measured once for a folder: the same workload then has the same costs."""
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


def _in_words(savings: Savings) -> str:
    """What the blocks save of the workload, by their kinds."""
    parts = []
    for part, name in zip(PARTS, ("attention", "MLP"), strict=True):
        saved = [savings.saved_ms(block) for block in savings.blocks if part_of(block) == part]
        if saved:
            first, last = f"{min(saved):.3g}", f"{max(saved):.3g}"
            parts.append(f"a linear {name} saves {first if first == last else f'{first} to {last}'} ms")
    return f"Of {savings.ms():.3g} ms for the workload, {' and '.join(parts)}, counted from the graph."
