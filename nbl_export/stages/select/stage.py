"""Moments → plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.blocks import ATTENTION, Block, part_of
from nbl_export.files import write_json
from nbl_export.linearize.plan import Plan, load_plan, ranks_of
from nbl_export.linearize.selection import Curve, PlanLoss, ScoredLayer, Scores
from nbl_export.progress import Listener, Silent
from nbl_export.ranks import ALONE
from nbl_export.records import to_json
from nbl_export.settings import SelectSettings
from nbl_export.stages.run import Run, opened

if TYPE_CHECKING:
    from nbl_export.stages.select.choose import Prefix
    from nbl_export.stages.select.jobs import Jobs


def select(
    out: str | Path | Run,
    settings: SelectSettings,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Plan:
    """Score every layer, choose K of them, and save their W and b with the evidence for the proof; returns the plan."""
    from nbl_export.models.device import exact_float32
    from nbl_export.stages.select.jobs import Jobs

    with opened(out, settings, listener, trust_remote_code, rehash, several=True) as (run, asked):
        ws, ranks = run.workspace, run.ranks
        calibrated = ranks.shared(lambda: ws.require("calibrate"))
        made_of, device = {"calibrate": calibrated.result}, run.on(asked.device)
        if not ranks.first:
            with closing(Jobs(run, calibrated.result, asked, Silent())) as own, exact_float32():
                ranks.follow(lambda: own.by_name)
            return load_plan(ws.plan)
        with ranks.leading():
            if asked.reads_graph:
                made_of["export"] = ws.require("export").result
            with replace(run, ranks=ALONE).stage("select", asked.as_json(), made_of, device) as work:
                if work:
                    with closing(Jobs(run, calibrated.result, asked, work)) as jobs:
                        work.files = _made(jobs, asked, work)
        return load_plan(ws.plan)


def _made(jobs: Jobs, settings: SelectSettings, listener: Listener) -> list[Path]:
    """Choose and fit; the files of the plan and of what was found."""
    from nbl_export.linearize.plan import save_plan
    from nbl_export.linearize.scores import check_selection, predicted_excess, score_layers
    from nbl_export.models.layers import FULL, positions
    from nbl_export.stages.select.choose import Choosing, Shipped, choose
    from nbl_export.stages.select.speeds import SpeedMeter
    from nbl_export.stages.select.workload import in_words, savings_in

    run, moments, metadata, fitting = jobs.run, jobs.moments, jobs.metadata, jobs.fitting
    ws, others, kinds = run.workspace, metadata.get("others", {}), metadata.get("kinds", {})
    width = None if settings.rank is None else len(next(iter(moments.layers.values())).x)
    check_selection(settings, list(moments.layers), width, others)
    ridge = fitting.scoring_ridge
    candidates = score_layers(moments.layers, ridge, listener, jobs.scores, run.ranks.count)
    empty = _plan(run, settings, metadata)
    savings = savings_in(ws, empty, moments.layers, settings)

    def ship(layers: Sequence[Block]) -> Shipped[tuple[Plan, PlanLoss | None]]:
        predicted = None if settings.layers is not None else predicted_excess(candidates, layers)
        made = _fitted(empty, layers, jobs, settings, predicted)
        return Shipped(made, made[1].loss if made[1] else None)

    def speeds(prefix: Prefix) -> SpeedMeter:
        limit = positions(run.model.model)
        return SpeedMeter(ws, empty, lambda k: fitting.timed(prefix(k)), limit, listener, settings.workloads)

    curve: Curve | None = None
    kl_tokens: int | None = None
    if settings.layers is not None:
        plan, result = ship(sorted(settings.layers)).made
    else:
        if savings and settings.workload:
            listener.note(in_words(savings))
        choosing = Choosing(settings, jobs, listener, savings)
        candidates = choosing.scored(candidates)
        if any(c.kl is not None for c in candidates):
            kl_tokens = choosing.kl_tokens
        (plan, result), curve = choose(choosing, candidates, settings, speeds, ship, listener)
    save_plan(ws.plan, plan)
    ws.repair_checkpoint.unlink(missing_ok=True)
    scored = tuple(
        ScoredLayer(**vars(c), kind=kinds.get(str(c.layer), FULL if part == ATTENTION else part))
        for c in candidates
        for part in [part_of(c.layer)]
    )
    workload_ms = savings.ms() if savings and settings.workload else None
    dtype = metadata.get("dtype")
    scores = Scores(scored, others, curve, result, dtype, settings.workload, workload_ms, kl_tokens)
    raw = to_json(scores)
    if raw["result"]:  # of which only what was measured
        raw["result"] = {name: value for name, value in raw["result"].items() if value is not None}
    write_json(ws.candidates, raw)
    return [ws.plan, ws.plan.with_suffix(".safetensors"), ws.candidates]


def _fitted(
    empty: Plan,
    chosen: Sequence[Block],
    jobs: Jobs,
    settings: SelectSettings,
    predicted: float | None,
) -> tuple[Plan, PlanLoss | None]:
    """The plan of the chosen layers, and its loss on the selection text.

    The loss of a decoder is measured if it is not known from the choice of layers, or if it was only ``predicted`` (the
    excess, in nats).
    """
    fitting, decoder = jobs.fitting, jobs.run.model.task.causal
    layers = fitting.final(chosen)
    plan = empty.with_replaced(layers)
    if not chosen:
        return plan, None
    result = PlanLoss(predicted_excess=predicted)
    if settings.repair:
        result = replace(result, before_repair=jobs.loss_of(plan))
        repaired = fitting.repaired(layers)
        layers = {**repaired.layers}
        plan = replace(plan.with_replaced(layers), adapters=repaired.adapters)
    if settings.truncates:
        if decoder:
            result = replace(result, before_rank=jobs.loss_of(plan))
        layers, lost = fitting.truncated(layers)
        plan = plan.with_replaced(layers)
        if settings.rank is None:
            plan = replace(plan, ranks=ranks_of(plan.layers))
            result = replace(result, ranks={str(layer): rank for layer, rank in plan.ranks.items()})
        result = replace(result, rank_lost={str(layer): share for layer, share in lost.items()})
    if decoder and (result != PlanLoss() or settings.fit == "sequential"):
        result = replace(result, loss=jobs.loss_of(plan))
    return plan, result if result != PlanLoss() else None


def _plan(run: Run, settings: SelectSettings, metadata: Mapping[str, Any]) -> Plan:
    """A plan that replaces nothing yet."""
    from nbl_export.calibrate.probe import load_probe

    probe = load_probe(run.workspace.probe)
    return Plan(
        model=run.model.source.fingerprint,
        hidden_size=next(iter(probe.y.values())).shape[1],
        layer_count=metadata.get("blocks", len(probe.y)),
        fit_input=settings.fit_input,
        criterion=str(settings.criterion) if settings.layers is None else "by hand",
        ridge=settings.ridge,
        calibration_tokens=metadata["tokens"],
        layers={},
        probe=dict(probe.inputs),
        probe_u=probe.x if settings.fit_input == "normed" else probe.h,
        probe_y=probe.y,
        fit=settings.fit,
        repair=settings.repair,
        rank=settings.rank,
        probe_routes=probe.routes,
    )
