"""Both graphs → TensorRT engines with manifests."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.blocks import attentions
from nbl_export.errors import InputError
from nbl_export.files import read_json, sha256_of_file
from nbl_export.linearize.plan import load_plan
from nbl_export.progress import Listener
from nbl_export.settings import EngineSettings
from nbl_export.stages.rewrite import check_baseline, current_rewrite
from nbl_export.stages.run import Run, opened
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    import torch

    from nbl_export.engine.manifest import EngineFile, Limits
    from nbl_export.models.source import ModelSource


def build(
    out: str | Path | Run,
    settings: EngineSettings | None = None,
    listener: Listener | None = None,
    rehash: bool = False,
) -> list[EngineFile]:
    """Build the base and the linearized TensorRT engine; returns them with their manifests."""
    from nbl_export.batch import BASE, LINEARIZED
    from nbl_export.engine.build import Source, Target, build_pair
    from nbl_export.engine.library import check_capabilities, choose_library, find_gpu
    from nbl_export.engine.manifest import EngineFile, load_manifest
    from nbl_export.graph.cache import state_pairs
    from nbl_export.graph.io import load_graph

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
    from nbl_export.engine.library import check_capabilities, choose_library, find_gpu

    check_limits(settings, None)
    check_capabilities(choose_library(settings.library, find_gpu()), settings.sm)


def check_states(model: torch.nn.Module) -> None:
    """Refuse, before any work, a model some of whose layers keep a state, which engines have no buffers for."""
    from nbl_export.models.dummy_run import state_kinds

    if found := state_kinds(model):
        layer, kinds = next(iter(found.items()))
        raise _keeps_states(f"{len(found)} of {type(model).__name__}; layer {layer}: {kinds}")


def _keeps_states(what: str) -> InputError:
    return InputError(
        f"Engines are not built of models with layers that keep a state ({what}): leave the engines out."
    )


def check_limits(settings: EngineSettings, positions: int | None) -> Limits:
    """The shapes to build for, held to the model's number of positions where that is known."""
    from nbl_export.engine.manifest import limits

    return limits(settings.max_batch, settings.max_seq, settings.max_context, positions)


def model_positions(ws: Workspace) -> int | None:
    """The model's number of positions, from the configuration of the baseline graph, or of the other one without it."""
    path = (ws.baseline if ws.baseline.exists() else ws.model).with_name("config.json")
    config = read_json(path, "The baseline's configuration", "run `nbl-export export` again")
    try:
        both = {**config, **(config.get("text_config") or {})}
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        return next((int(both[name]) for name in names if both.get(name)), None)
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            f"{path} is not a configuration of a model: run `nbl-export export` again."
        ) from None


def current_engines(ws: Workspace) -> tuple[EngineFile, ...]:
    """The engines of the current graphs, each checked against its manifest; empty if there are none.

    :func:`passed_over` says why those are not current that there are.
    """
    from nbl_export.engine.manifest import EngineFile, load_manifest

    if ws.record("build") is None or ws.stale("build"):
        return ()
    ws.require("build")
    return tuple(EngineFile(path, load_manifest(path)) for path in (ws.base_engine, ws.engine))


def passed_over(ws: Workspace) -> str | None:
    """Why the engines in the folder are not those of its graphs, if there are such."""
    if ws.record("build") is None or not (why := ws.stale("build")):
        return None
    return f"the engines in {ws.engine.parent} are of other graphs ({why}): run `nbl-export build {ws.root}`"
