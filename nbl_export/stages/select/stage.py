"""Moments → plan."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.progress import Listener, Silent
from nbl_export.ranks import ALONE
from nbl_export.settings import SelectSettings
from nbl_export.stages.run import Run, opened


def select(
    out: str | Path | Run,
    settings: SelectSettings,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Plan:
    """Score every layer, choose K of them, and save their W and b with the evidence for the proof; returns the plan."""
    from nbl_export.models.load import exact_float32
    from nbl_export.stages.select.make import make_plan
    from nbl_export.stages.select.measure import Measuring

    with opened(out, settings, listener, trust_remote_code, rehash, several=True) as (run, asked):
        ws, ranks = run.workspace, run.ranks
        calibrated = ranks.shared(lambda: ws.require("calibrate"))
        made_of, device = {"calibrate": calibrated.result}, run.on(asked.device)
        if not ranks.first:
            with closing(Measuring(run, calibrated.result, asked, Silent())) as own, exact_float32():
                ranks.follow(lambda: own.jobs)
            return load_plan(ws.plan)
        with ranks.leading():
            if asked.reads_graph:
                made_of["export"] = ws.require("export").result
            with replace(run, ranks=ALONE).stage("select", asked.as_json(), made_of, device) as work:
                if work:
                    with closing(Measuring(run, calibrated.result, asked, work)) as measuring:
                        work.files = make_plan(measuring)
        return load_plan(ws.plan)
