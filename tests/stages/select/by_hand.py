"""What tests of selection do with an output folder, and the loss of a plan computed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export import api
from nbl_export.calibrate.text import load_text
from nbl_export.linearize.plan import Adapter, LinearLayer, load_plan
from nbl_export.linearize.swap import adapted
from nbl_export.progress import Silent
from nbl_export.workspace import Workspace
from tests.fixtures_graph import maps_in_place

QUICK = api.VerifySettings(quality=False, speed=False)


NONE: Mapping[str, Adapter] = {}


def forget(out: Path, *stages: str) -> None:
    record = out / "nbl" / "workspace.json"
    raw = json.loads(record.read_text())
    for stage in stages:
        del raw["stages"][stage]
    record.write_text(json.dumps(raw))


def select(out: Path, settings: api.SelectSettings, listener: Silent | None = None) -> api.Plan:
    """The plan with its maps in memory: one that was read from its file reads what the file has now."""
    plan = api.select(out, settings, listener)
    return replace(
        plan, layers={i: LinearLayer(np.array(m.w), np.array(m.b)) for i, m in plan.layers.items()}
    )


def candidates(out: Path) -> Any:
    return json.loads((out / "nbl" / "candidates.json").read_text())


def files(out: Path) -> dict[str, bytes]:
    own = (".lock", "digests.json")
    return {
        p.name: p.read_bytes() for p in sorted((out / "nbl").iterdir()) if p.is_file() and p.name not in own
    }


def same_plan(a: api.Plan, b: api.Plan) -> bool:
    return a.chosen == b.chosen and all(
        np.array_equal(a.layers[i].w, b.layers[i].w) and np.array_equal(a.layers[i].b, b.layers[i].b)
        for i in a.chosen
    )


def kl_by_hand(
    out: Path, model: Any, layers: Mapping[int, LinearLayer], adapters: Mapping[str, Adapter] = NONE
) -> float:
    """Mean KL(original ‖ changed) of the selection text in float64, by whole runs with maps put in place by hand."""
    text = load_text(Workspace.open(out).text)
    ids = torch.from_numpy(text.selection.astype(np.int64))
    plan = replace(load_plan(Workspace.open(out).plan), layers=layers)
    with torch.inference_mode():
        log_p = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        with maps_in_place(model, plan), adapted(model, adapters):
            log_q = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def curve(out: Path) -> list[dict[str, Any]]:
    select(out, api.SelectSettings(k=5))
    points: list[dict[str, Any]] = candidates(out)["curve"]["points"]
    return points
