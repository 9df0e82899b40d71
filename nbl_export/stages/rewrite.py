"""Rewrite the baseline graph by the plan into ``model.onnx``, and build TensorRT engines of both graphs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from nbl_export.blocks import attentions
from nbl_export.engine.build import Source, Target, build_pair
from nbl_export.engine.library import check_capabilities, choose_library, find_gpu
from nbl_export.engine.manifest import EngineFile, Limits, limits, load_manifest
from nbl_export.errors import InputError
from nbl_export.export.sidecars import copy_sidecars
from nbl_export.files import sha256_of_file, write_json
from nbl_export.graph.cache import state_pairs
from nbl_export.graph.io import load_graph, save_beside, save_graph
from nbl_export.linearize.plan import load_plan
from nbl_export.models.dummy_run import state_kinds
from nbl_export.models.source import ModelSource
from nbl_export.progress import Listener
from nbl_export.records import to_json
from nbl_export.rewrite.replace import kept_layers, rewrite_file, rewrite_record
from nbl_export.settings import EngineSettings, Settings
from nbl_export.stages.run import Run, check_baseline, current_rewrite, model_positions, opened
from nbl_export.workspace import BASE, LINEARIZED, Workspace


def rewrite(
    out: str | Path | Run,
    listener: Listener | None = None,
    rehash: bool = False,
    whole: bool | None = None,
) -> Path:
    """Rewrite the baseline graph by the plan, prove it and count; returns the path of the graph.

    It reads its weights from the baseline's data file, and its own has W and b alone; a ``whole`` graph has all weights
    in its own. None is as it was made before.
    """
    with opened(out, Settings(), listener, rehash=rehash) as (run, _):
        ws = run.workspace
        made_of = {stage: ws.require(stage).result for stage in ("select", "export")}
        if whole is None:
            before = ws.record("rewrite")
            whole = before is not None and bool(before.settings.get("whole"))
        with run.stage("rewrite", {"whole": True} if whole else {}, made_of) as work:
            if work:
                check_baseline(ws)
                plan = load_plan(ws.plan)
                if plan.model != run.model.source.fingerprint:
                    raise InputError(
                        f"{ws.plan} is the plan of another model: run `nbl-export select {ws.root}` again."
                    )
                folder, graph = ws.baseline.parent, ws.baseline.name
                beside = [f for f in ws.paths(ws.finished("export")) if folder in f.parents]
                files = [f for f in beside if not f.name.startswith(graph)]
                kept = kept_layers(load_graph(ws.baseline), plan)
                save = save_graph if whole else save_beside
                result = rewrite_file(ws.baseline, plan, ws.model, listener=work, save=save)
                write_json(ws.rewrite_summary, to_json(rewrite_record(result)))
                sidecars = copy_sidecars(files, ws.root, plan.linear_attention, kept, folder)
                work.files = [*result.files, ws.rewrite_summary, *sidecars]
        return ws.model


def drop_baseline(ws: Workspace) -> None:
    """Delete the unmodified graph and what lies beside it; no graph reads its data."""
    if record := ws.record("export"):
        folder = ws.baseline.parent
        files = [path for path in ws.paths(record) if folder in path.parents]
        ws.drop("export", files)
        for empty in sorted({path.parent for path in files}, reverse=True):
            with suppress(OSError):  # somebody else's files are in it
                empty.rmdir()


def build(
    out: str | Path | Run,
    settings: EngineSettings | None = None,
    listener: Listener | None = None,
    rehash: bool = False,
) -> list[EngineFile]:
    """Build the base and the linearized TensorRT engine; returns them with their manifests."""
    asked = settings or EngineSettings()
    with opened(out, asked, listener, rehash=rehash, check=check_engines) as (run, _):
        ws = run.workspace
        gpu = find_gpu()
        library = choose_library(asked.library, gpu)
        capabilities = check_capabilities(library, asked.sm)
        rewritten = current_rewrite(ws)
        if pairs := state_pairs(load_graph(ws.model)):
            raise _keeps_states(f"{pairs[0].past.name} is an input of {ws.model}")
        shapes = check_limits(asked, model_positions(ws))
        recorded = {
            "library": str(library),
            "compute_capabilities": list(capabilities),
            "gpu": None if library.ahead_of_time or gpu is None else asdict(gpu),
            **asdict(shapes),
        }
        exported = ws.require("export").settings
        with run.stage("build", recorded, {"rewrite": rewritten.result}) as work:
            if work:
                check_baseline(ws)
                plan = load_plan(ws.plan)
                if exported["precision"] == "fp32":
                    work.note(
                        "The graphs are fp32, so the engines are too, without fused attention; for half precision: "
                        f"nbl-export export {ws.root} --precision fp16 --kv-cache static, then rewrite and build."
                    )
                sources = [
                    Source(BASE, ws.baseline, len(attentions(plan.candidates)), ws.base_engine),
                    Source(
                        LINEARIZED,
                        ws.model,
                        len(plan.attention_layers),
                        ws.engine,
                        plan.blocks,
                        sha256_of_file(ws.plan),
                    ),
                ]
                target = Target(library, gpu, shapes, tuple(capabilities))
                work.files = build_pair(target, sources, work)
        return [EngineFile(path, load_manifest(path)) for path in (ws.base_engine, ws.engine)]


def check_engines(_source: ModelSource | None, settings: EngineSettings) -> None:
    """Refuse, before any work, shapes that contradict each other, and a library that is not here.

    Raises :class:`InputError` or :class:`MissingDependencyError`.
    """
    check_limits(settings, None)
    check_capabilities(choose_library(settings.library, find_gpu()), settings.sm)


def check_states(model: torch.nn.Module) -> None:
    """Refuse, before any work, a model some of whose layers keep a state, which engines have no buffers for."""
    if found := state_kinds(model):
        layer, kinds = next(iter(found.items()))
        raise _keeps_states(f"{len(found)} of {type(model).__name__}; layer {layer}: {kinds}")


def _keeps_states(what: str) -> InputError:
    return InputError(
        f"Engines are not built of models with layers that keep a state ({what}): leave the engines out."
    )


def check_limits(settings: EngineSettings, positions: int | None) -> Limits:
    """The shapes to build for, held to the model's number of positions where that is known."""
    return limits(settings.max_batch, settings.max_seq, settings.max_context, positions)
