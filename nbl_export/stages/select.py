"""Moments → plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.progress import Listener
from nbl_export.run import Run
from nbl_export.settings import SelectSettings
from nbl_export.workspace import sha256_of_json, write_json


def select(run: Run, settings: SelectSettings) -> Plan:
    """Moments → plan: score every layer, choose K, keep their W and b with the proof's evidence."""
    from nbl_export.calibrate.moments import load_moments
    from nbl_export.calibrate.probe import load_probe
    from nbl_export.linearize.plan import LinearLayer, save_plan
    from nbl_export.linearize.select import choose_layers, fit_layer, score_layers

    settings.check()
    ws = run.workspace
    calibrated = ws.require("calibrate", f"nbl-export calibrate MODEL -o {ws.root}")
    key = sha256_of_json({"calibrate": calibrated.key, "select": asdict(settings)})

    def work(listener: Listener) -> list[Path]:
        moments, metadata = load_moments(ws.moments)
        candidates = score_layers(moments, settings.fit_input, settings.ridge, listener)
        chosen = choose_layers(candidates, settings.k, settings.criterion, settings.layers)
        layers = {}
        for layer in chosen:
            fit = fit_layer(moments, layer, settings.fit_input, settings.ridge)
            layers[layer] = LinearLayer(fit.w.astype("float32"), fit.b.astype("float32"))
        probe = load_probe(ws.probe)
        u = probe.x if settings.fit_input == "normed" else probe.h
        plan = Plan(
            model=run.model.source.fingerprint,
            hidden_size=len(next(iter(moments.layers.values())).x),
            layer_count=metadata["blocks"],
            fit_input=settings.fit_input,
            criterion=settings.criterion if settings.layers is None else "by hand",
            ridge=settings.ridge,
            calibration_tokens=metadata["tokens"],
            layers=layers,
            probe={n: getattr(probe, n) for n in ("input_ids", "attention_mask", "position_ids")},
            probe_u=u,
            probe_y=probe.y,
        )
        save_plan(ws.plan, plan)
        write_json(ws.candidates, {"candidates": [c.as_json() for c in candidates]})
        return [ws.plan, ws.plan.with_suffix(".safetensors"), ws.candidates]

    run.stage("select", key, asdict(settings), work)
    return load_plan(ws.plan)
