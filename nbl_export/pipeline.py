"""The stages in order; the only module that knows all of them.

Each verb works on an output folder and skips what is already done there with the same settings:

    calibrate → select ─┐
    export ─────────────┴→ rewrite → verify → report
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export import __version__
from nbl_export.calibrate.text import TextSettings
from nbl_export.errors import InputError
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.progress import Listener
from nbl_export.report.schema import Check, Report, jsonable, load_report
from nbl_export.run import Run
from nbl_export.settings import CalibrateSettings, SelectSettings, VerifySettings
from nbl_export.workspace import StageRecord, Workspace, atomic_path, read_json, sha256_of_json, write_json

if TYPE_CHECKING:
    import torch

    from nbl_export.calibrate.text import CalibrationText
    from nbl_export.graph.rewrite import RewriteResult
    from nbl_export.verify.measure import Measurement


# calibrate ---------------------------------------------------------------------------------------


def calibrate(run: Run, settings: CalibrateSettings) -> None:
    """Text → moments and probe."""
    from nbl_export.calibrate.collect import Checkpoint, collect_moments
    from nbl_export.calibrate.moments import save_moments
    from nbl_export.calibrate.probe import probe_model, save_probe
    from nbl_export.calibrate.text import save_text
    from nbl_export.models.layers import check_served

    settings.check()
    ws, fingerprint = run.workspace, run.model.source.fingerprint
    key = sha256_of_json({"model": fingerprint, "text": asdict(settings), "files": _stamps(settings.sources)})

    def work(listener: Listener) -> list[Path]:
        model = run.model.model
        check_served(model)
        _check_room(ws, model)
        text = _kept_text(ws, key)
        if text is None:
            text = _read_text(run, settings, listener)
            save_text(ws.text, text)
            write_json(_text_record(ws), {"key": key})
        tokens = text.calibration
        _check_enough(tokens.size, model)
        moments = collect_moments(model, tokens, fingerprint, Checkpoint(ws.checkpoint), listener)
        save_moments(ws.moments, moments, {"model": fingerprint, "tokens": int(tokens.size)})
        save_probe(ws.probe, probe_model(model, tokens))
        ws.checkpoint.unlink(missing_ok=True)
        return [ws.text, ws.moments, ws.probe]

    run.stage("calibrate", key, asdict(settings), work)


def _text_record(ws: Workspace) -> Path:
    return ws.text.with_suffix(".json")


def _kept_text(ws: Workspace, key: str) -> CalibrationText | None:
    """The text of an interrupted calibration with the same settings; None if there is none, or it is damaged."""
    from nbl_export.calibrate.text import load_text

    try:
        record = read_json(_text_record(ws), "The record of the calibration text", "")
        return load_text(ws.text) if record == {"key": key} else None
    except InputError:
        return None


def _read_text(run: Run, text: TextSettings, listener: Listener) -> CalibrationText:
    from nbl_export.calibrate.text import SELF, documents, pack, sample_from_model

    if text.sources == (SELF,):
        return sample_from_model(run.model.model, run.model.tokenizer, text, listener)
    return pack(documents(text.sources, text.field), run.model.tokenizer, text, listener)


def _stamps(sources: Sequence[str]) -> list[tuple[str, int, int]]:
    """Name, size and modification time of the local files named: changed text is another calibration."""
    from nbl_export.calibrate.text import SELF, local_files

    stamps = []
    for source in sources:
        for file in (local_files(source) or []) if source != SELF else []:
            status = file.stat()
            stamps.append((str(file), status.st_size, status.st_mtime_ns))
    return stamps


def _check_enough(tokens: int, model: torch.nn.Module) -> None:
    from nbl_export.models.layers import hidden_size

    d = hidden_size(model)
    if tokens < d + 1:
        raise InputError(
            f"{tokens:,} calibration tokens are too few for a model of width {d}: at least {d + 1:,} are needed, "
            f"{20 * d:,} or more are advised; give more text, or raise --samples or --seq-len."
        )


def _check_room(ws: Workspace, model: torch.nn.Module) -> None:
    """Refuse early what the disk cannot hold: two float32 graphs, the moments and one checkpoint."""
    from nbl_export.models.layers import hidden_size, layer_count

    weights = 4 * sum(p.numel() for p in model.parameters())
    moments = 8 * 5 * hidden_size(model) ** 2 * layer_count(model)
    have = sum(f.stat().st_size for f in ws.root.rglob("*") if f.is_file())
    need = 2 * weights + 2 * moments - have
    free = shutil.disk_usage(ws.root).free
    if free < need:
        raise InputError(
            f"{ws.root} has {free / 2**20:,.0f} MiB free; this model needs about {need / 2**20:,.0f} MiB: "
            "free some space or choose another --output."
        )


# select ------------------------------------------------------------------------------------------


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
            layer_count=len(candidates),
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


# export ------------------------------------------------------------------------------------------


def export(run: Run) -> None:
    """Model → ``baseline/model.onnx`` with configuration and tokenizer files beside it."""
    from nbl_export.export.torch import OPSET, export_torch
    from nbl_export.models.layers import check_served

    ws = run.workspace
    settings = {"exporter": "torch", "opset": OPSET, "dtype": "float32"}
    key = sha256_of_json({"model": run.model.source.fingerprint, "export": settings, "version": __version__})

    def work(listener: Listener) -> list[Path]:
        check_served(run.model.model)
        files = export_torch(run.model.model, ws.baseline, listener)
        return files + _save_configs(run, ws.baseline.parent)

    run.stage("export", key, settings, work)


def _save_configs(run: Run, folder: Path) -> list[Path]:
    from nbl_export.export.genai_config import NAME as GENAI
    from nbl_export.export.genai_config import genai_config
    from nbl_export.models.layers import layer_count
    from nbl_export.models.load import quiet
    from nbl_export.runtime.torch import kv_shape

    with quiet():
        config: Any = run.model.model.config
        config.save_pretrained(folder)
        generation: Any = getattr(run.model.model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        run.model.tokenizer.save_pretrained(folder)
    heads, size = kv_shape(run.model.model)
    layers = layer_count(run.model.model)
    write_json(folder / GENAI, genai_config(config.get_text_config(), layers, heads, size))
    graph = run.workspace.baseline.name
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(graph))


# rewrite -----------------------------------------------------------------------------------------


def rewrite(run: Run) -> None:
    """Baseline graph + plan → ``model.onnx``, proven and counted, loadable as it stands."""
    from nbl_export.graph.prove import proofs_as_json
    from nbl_export.graph.rewrite import rewrite_file

    ws = run.workspace
    key, exported = _rewrite_inputs(ws)

    def work(listener: Listener) -> list[Path]:
        plan = load_plan(ws.plan)
        if plan.model != run.model.source.fingerprint:
            raise InputError(
                f"{ws.plan} is the plan of another model: run `nbl-export select {ws.root}` again."
            )
        with listener.task("Rewriting the graph", 1, "graph") as task:
            result: RewriteResult = rewrite_file(ws.baseline, plan, ws.model)
            task.advance(1)
        summary = {
            "before": result.before.as_json(),
            "after": result.after.as_json(),
            "kv_layers": list(plan.kept),
            "proofs": proofs_as_json(result.proofs),
        }
        write_json(_rewrite_summary(ws), jsonable(summary))
        beside = [ws.root / name for name in exported.files if not Path(name).name.startswith(ws.model.name)]
        return [*result.files, _rewrite_summary(ws), *(_copy_config(path, ws.root, plan) for path in beside)]

    run.stage("rewrite", key, {}, work)


def _rewrite_inputs(ws: Workspace) -> tuple[str, StageRecord]:
    """The key that a rewrite of what is there now has, and the export it starts from; both must be done."""
    selected = ws.require("select", f"nbl-export select {ws.root} --k K")
    exported = ws.require("export", f"nbl-export export {ws.root}")
    return sha256_of_json({"select": selected.key, "export": exported.key}), exported


def _copy_config(source: Path, folder: Path, plan: Plan) -> Path:
    """Copy a file that lies beside the baseline graph; configurations are told what was linearized."""
    from nbl_export.export.genai_config import NAME as GENAI

    target = folder / source.name
    if source.name in (GENAI, "config.json"):
        config = read_json(source, "The baseline's configuration", "run `nbl-export export` again")
        if source.name == GENAI:
            config["model"]["decoder"]["num_hidden_layers"] = len(plan.kept)
        else:
            config["nbl_export"] = {"linearized_layers": list(plan.chosen), "kv_layers": list(plan.kept)}
        write_json(target, config)
    else:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    return target


def _rewrite_summary(ws: Workspace) -> Path:
    return ws.nbl / "rewrite.json"


# verify ------------------------------------------------------------------------------------------


def verify(run: Run, settings: VerifySettings) -> Report:
    """Parity, method loss and speed → ``report/``; a failed gate is in the report, not an exception."""
    from nbl_export.calibrate.text import load_text
    from nbl_export.report.render import write_report
    from nbl_export.verify.measure import measure

    settings.check()
    ws = run.workspace
    rewrite_key, _ = _rewrite_inputs(ws)
    rewritten = ws.require("rewrite", f"nbl-export rewrite {ws.root}")
    if rewritten.key != rewrite_key:
        raise InputError(
            f"The plan or the baseline changed after `rewrite`: run `nbl-export rewrite {ws.root}` first."
        )
    key = sha256_of_json({"rewrite": rewritten.key, "verify": asdict(settings)})

    def work(listener: Listener) -> list[Path]:
        plan, text = load_plan(ws.plan), load_text(ws.text)
        measured = measure(run.model.model, plan, text, ws.baseline, ws.model, settings, listener)
        return write_report(ws.report, _report(run, plan, settings, measured))

    run.stage("verify", key, asdict(settings), work)
    return load_report(ws.report / "report.json")


def _report(run: Run, plan: Plan, settings: VerifySettings, measured: Measurement) -> Report:
    from nbl_export.report.environment import environment

    ws = run.workspace
    records = {name: r for name in ("calibrate", "select", "export", "rewrite") if (r := ws.record(name))}
    rewritten = read_json(_rewrite_summary(ws), "The record of the rewrite", "run `nbl-export rewrite` again")
    scores = read_json(ws.candidates, "The file of the layers' scores", "run `nbl-export select` again")
    rewriting = Check(
        "graph rewrite",
        "passed",
        f"{len(plan.layers)} attention layers and KV pairs gone, every region proven, ONNX checker passed",
    )
    return Report(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        tool_version=__version__,
        model={k: v for k, v in run.model.source.as_json().items() if k != "path"}
        | {"hidden_size": plan.hidden_size, "layers": plan.layer_count},
        environment=environment(),
        settings={name: dict(r.settings) for name, r in records.items()} | {"verify": asdict(settings)},
        hashes={
            "model": run.model.source.fingerprint,
            **{name: digest for r in records.values() for name, digest in r.files.items()},
        },
        stage_seconds={name: r.seconds for name, r in records.items()},
        selection={
            "criterion": plan.criterion,
            "fit_input": plan.fit_input,
            "ridge": plan.ridge,
            "calibration_tokens": plan.calibration_tokens,
            "layers": list(plan.chosen),
            **scores,
        },
        graph=rewritten,
        parity=measured.parity,
        divergence=measured.divergence,
        method_loss=measured.method_loss,
        speed=measured.speed,
        checks=[rewriting, *measured.checks],
        notes=[note for r in records.values() for note in r.notes] + measured.notes,
    )


# report ------------------------------------------------------------------------------------------


def report(ws: Workspace) -> Report:
    """Draw ``report.md`` and ``junit.xml`` anew from ``report.json``; needs no model."""
    from nbl_export.report.render import write_report

    value = load_report(ws.report / "report.json")
    write_report(ws.report, value)
    return value


# all ---------------------------------------------------------------------------------------------


def run_all(
    run: Run, calibration: CalibrateSettings, selection: SelectSettings, verification: VerifySettings
) -> Report:
    """Every stage in order; what is done already with the same settings is kept."""
    from nbl_export.linearize.select import check_k
    from nbl_export.models.layers import layer_count
    from nbl_export.runtime.ort import require_onnxruntime

    require_onnxruntime()  # before the first minute of work, not after it
    if selection.k is not None and run.workspace.record("calibrate") is None:
        check_k(selection.k, layer_count(run.model.model))
    calibrate(run, calibration)
    select(run, selection)
    export(run)
    rewrite(run)
    return verify(run, verification)
