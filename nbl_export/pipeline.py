"""The stages in order; the only module that knows all of them.

Each verb works on an output folder and skips what is already done there with the same settings:

    calibrate → select ─┐
    export ─────────────┴→ rewrite → (build →) verify → report
"""

from __future__ import annotations

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
from nbl_export.report.schema import Report, jsonable, load_report
from nbl_export.run import Run
from nbl_export.settings import (
    CalibrateSettings,
    EngineSettings,
    ExportSettings,
    SelectSettings,
    VerifySettings,
)
from nbl_export.workspace import (
    StageRecord,
    Workspace,
    atomic_path,
    read_json,
    sha256_of_file,
    sha256_of_json,
    write_json,
)

if TYPE_CHECKING:
    import torch

    from nbl_export.calibrate.text import CalibrationText
    from nbl_export.engine.pair import EngineFile
    from nbl_export.graph.rewrite import RewriteResult


# Text on which the reach of each tensor is measured for float16: 1,024 tokens take seconds.
_RANGE_ROWS, _RANGE_TOKENS = 4, 256


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


def export(run: Run, settings: ExportSettings) -> None:
    """Model → ``baseline/model.onnx`` with configuration and tokenizer files beside it."""
    from nbl_export.calibrate.text import load_text
    from nbl_export.export.forms import FORMS
    from nbl_export.export.half import save_in_precision
    from nbl_export.export.torch import trace
    from nbl_export.graph.precision import precision_of
    from nbl_export.models.layers import check_served

    settings.check()
    ws = run.workspace
    form, precision = FORMS[settings.kv_cache], precision_of(settings.precision)
    recorded = {"exporter": "torch", "opset": form.opset, **asdict(settings)}
    base = {"model": run.model.source.fingerprint, "export": recorded, "version": __version__}
    if precision.name == "fp16":
        # Which tensors float16 can hold is measured on calibration text.
        base["calibrate"] = ws.require("calibrate", f"nbl-export calibrate MODEL -o {ws.root}").key

    def work(listener: Listener) -> list[Path]:
        check_served(run.model.model)
        graph = trace(run.model.model, form, listener)
        rows = _range_rows(load_text(ws.text)) if precision.name == "fp16" else []
        files, kept = save_in_precision(graph, ws.baseline, precision, rows)
        write_json(ws.export_summary, {"kept_float32": [asdict(k) for k in kept]})
        return [*files, ws.export_summary, *_save_configs(run, ws.baseline.parent, settings)]

    run.stage("export", sha256_of_json(base), recorded, work)


def _range_rows(text: CalibrationText) -> list[Any]:
    return [text.prompt(row[:_RANGE_TOKENS]) for row in text.calibration[:_RANGE_ROWS]]


def _save_configs(run: Run, folder: Path, settings: ExportSettings) -> list[Path]:
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
    if settings.kv_cache == "concat":  # onnxruntime-genai knows no write_indices
        write_json(folder / GENAI, genai_config(config.get_text_config(), layers, heads, size))
    else:
        (folder / GENAI).unlink(missing_ok=True)
    graph = run.workspace.baseline.name
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(graph))


# rewrite -----------------------------------------------------------------------------------------


def rewrite(run: Run) -> None:
    """Baseline graph + plan → ``model.onnx``, proven and counted, loadable as it stands."""
    from nbl_export.export.genai_config import NAME as GENAI
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
        write_json(ws.rewrite_summary, jsonable(summary))
        folder = ws.baseline.parent
        beside = [f for name in exported.files if (f := ws.root / name).parent == folder]
        beside = [f for f in beside if not f.name.startswith(ws.model.name)]
        if GENAI not in {f.name for f in beside}:  # of an earlier export with another cache
            (ws.root / GENAI).unlink(missing_ok=True)
        return [*result.files, ws.rewrite_summary, *(_copy_config(path, ws.root, plan) for path in beside)]

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


# build -------------------------------------------------------------------------------------------


def build(run: Run, settings: EngineSettings) -> list[EngineFile]:
    """Both graphs → ``engine/``: base and linearized TensorRT engines, each with its manifest."""
    from nbl_export.engine.gpu import find_gpu
    from nbl_export.engine.library import check_capabilities, choose_library
    from nbl_export.engine.manifest import load_manifest
    from nbl_export.engine.pair import BASE, LINEARIZED, EngineFile, Source, build_pair

    settings.check()
    ws = run.workspace
    gpu = find_gpu()
    library = choose_library(settings.library, gpu)
    capabilities = check_capabilities(library, settings.sm)
    shapes = settings.limits(_positions(ws))
    recorded = {
        "library": str(library),
        "compute_capabilities": list(capabilities),
        "gpu": None if library.ahead_of_time or gpu is None else asdict(gpu),
        **asdict(shapes),
    }
    key = _build_key(_current_rewrite(ws), recorded)
    exported = ws.require("export", f"nbl-export export {ws.root}")

    def work(listener: Listener) -> list[Path]:
        plan = load_plan(ws.plan)
        if exported.settings["precision"] == "fp32":
            listener.note(
                "The graphs are fp32, so the engines are too, without fused attention; for half precision: "
                f"nbl-export export {ws.root} --precision fp16 --kv-cache static, then rewrite and build."
            )
        sources = [
            Source(BASE, ws.baseline, plan.layer_count, ws.base_engine),
            Source(LINEARIZED, ws.model, len(plan.kept), ws.engine),
        ]
        plan_hash = sha256_of_file(ws.plan)
        _, files = build_pair(library, gpu, sources, plan.chosen, plan_hash, shapes, capabilities, listener)
        return files

    run.stage("build", key, recorded, work)
    return [EngineFile(path, load_manifest(path)) for path in (ws.base_engine, ws.engine)]


def _positions(ws: Workspace) -> int | None:
    """The model's number of positions, from the configuration beside the baseline graph."""
    path = ws.baseline.with_name("config.json")
    config = read_json(path, "The baseline's configuration", "run `nbl-export export` again")
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return int(found) if found else None


def _current_rewrite(ws: Workspace) -> StageRecord:
    """The record of the rewrite, which must be of the plan and the baseline that are there now."""
    key, _ = _rewrite_inputs(ws)
    rewritten = ws.require("rewrite", f"nbl-export rewrite {ws.root}")
    if rewritten.key != key:
        raise InputError(
            f"The plan or the baseline changed after `rewrite`: run `nbl-export rewrite {ws.root}` first."
        )
    return rewritten


def _engines(ws: Workspace) -> tuple[EngineFile, ...]:
    """The engines of the graphs as they are now, each checked against its manifest; none if there are none."""
    from nbl_export.engine.manifest import load_manifest
    from nbl_export.engine.pair import EngineFile

    built = ws.record("build")
    if built is None or built.key != _build_key(_current_rewrite(ws), built.settings):
        return ()
    return tuple(EngineFile(path, load_manifest(path)) for path in (ws.base_engine, ws.engine))


def _build_key(rewritten: StageRecord, settings: dict[str, Any]) -> str:
    return sha256_of_json({"rewrite": rewritten.key, "build": settings})


# verify ------------------------------------------------------------------------------------------


def verify(run: Run, settings: VerifySettings) -> Report:
    """Parity, method loss and speed → ``report/``; a failed gate is in the report, not an exception."""
    from nbl_export.calibrate.text import load_text
    from nbl_export.report.assemble import assemble
    from nbl_export.report.render import write_report
    from nbl_export.verify.measure import measure

    settings.check()
    ws = run.workspace
    rewritten = _current_rewrite(ws)
    engines = _engines(ws)
    key = sha256_of_json(
        {
            "rewrite": rewritten.key,
            "engines": [e.manifest.hashes["engine"] for e in engines],
            "verify": asdict(settings),
        }
    )

    def work(listener: Listener) -> list[Path]:
        plan, text = load_plan(ws.plan), load_text(ws.text)
        measured = measure(run.model.model, plan, text, ws.baseline, ws.model, engines, settings, listener)
        report = assemble(ws, run.model.source, plan, asdict(settings), measured, engines)
        return write_report(ws.report, report)

    run.stage("verify", key, asdict(settings), work)
    return load_report(ws.report / "report.json")


# report ------------------------------------------------------------------------------------------


def report(ws: Workspace) -> Report:
    """Draw ``report.md`` and ``junit.xml`` anew from ``report.json``; needs no model."""
    from nbl_export.report.render import write_report

    value = load_report(ws.report / "report.json")
    write_report(ws.report, value)
    return value


# all ---------------------------------------------------------------------------------------------


def run_all(
    run: Run,
    calibration: CalibrateSettings,
    selection: SelectSettings,
    exporting: ExportSettings,
    verification: VerifySettings,
    engines: EngineSettings | None = None,
) -> Report:
    """Every stage in order; what is done already with the same settings is kept."""
    from nbl_export.linearize.select import check_k
    from nbl_export.models.layers import layer_count, positions
    from nbl_export.runtime.ort import require_onnxruntime

    require_onnxruntime()  # before the first minute of work, not after it
    if run.workspace.record("calibrate") is None:
        if selection.k is not None:
            check_k(selection.k, layer_count(run.model.model))
        if engines:
            engines.limits(positions(run.model.model))
    calibrate(run, calibration)
    select(run, selection)
    export(run, exporting)
    rewrite(run)
    if engines:
        build(run, engines)
    return verify(run, verification)
