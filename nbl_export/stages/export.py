"""Model → ``baseline/model.onnx`` with its configuration and tokenizer files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nbl_export.batch import EMBEDDINGS, PER_LAYER, PIXELS, TOKENS
from nbl_export.calibrate.probe import load_probe
from nbl_export.errors import InputError
from nbl_export.export.checks import check_form, crossed_on_copy
from nbl_export.export.experts import MOE, check_precision
from nbl_export.export.forms import FORMS, Form, embedding_form, encoder_form, reading_embeds
from nbl_export.export.others import as_hf_folder, check_known, export_with, find_exporter
from nbl_export.export.sidecars import GENAI, genai_config, with_embeds, with_states
from nbl_export.export.tidy import add_num_logits_input_to_file
from nbl_export.export.torch import save_in_precision, trace
from nbl_export.files import TEMPORARY, atomic_path, publish, write_json
from nbl_export.graph.embedding import add_features
from nbl_export.graph.io import set_folder
from nbl_export.graph.precision import precision_of
from nbl_export.graph.summary import ExportSummary, Float32Node, OnCopy
from nbl_export.models.candidates import check_supported
from nbl_export.models.dummy_run import cache_shapes, dummy_run
from nbl_export.models.folder import save_tokenizer
from nbl_export.models.layers import backbone, has_per_layer, position_rows
from nbl_export.models.load import check_processor
from nbl_export.models.media_tokens import LATER
from nbl_export.models.multimodal import placeholders, whole_config
from nbl_export.models.running import accepts, quiet
from nbl_export.models.source import ModelSource
from nbl_export.progress import Listener
from nbl_export.records import MODEL, SIDECARS, to_json
from nbl_export.settings import ExportSettings, RunSettings
from nbl_export.settings.choices import OPSETS
from nbl_export.stages.calibrate import loader_for
from nbl_export.stages.needs import check_disk, sizes_of_source
from nbl_export.stages.run import Run, opened


def export(
    out: str | Path | Run,
    settings: ExportSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
    there: bool = True,
) -> Path:
    """Export the unmodified model with its configuration and tokenizer files; returns the path of its graph.

    Where it was deleted on purpose, it is made again if it has to be ``there``.
    """
    with opened(out, settings or ExportSettings(), listener, trust_remote_code, rehash, check_export) as (
        run,
        asked,
    ):
        ws, model, source, task = run.workspace, run.model, run.model.source, run.model.task
        # The Python that runs the exporter does not affect the graph.
        recorded = {name: value for name, value in asked.as_json().items() if name != "exporter_python"}
        if asked.exported_by == "torch":
            recorded["opset"] = asked.opset or OPSETS[str(asked.kv_cache)]
            if asked.experts not in (None, FORMS[str(asked.kv_cache)].experts):
                recorded["experts"] = asked.experts
        if not task.causal:
            recorded |= {"task": task.name, "pooling": vars(model.pooling) if model.pooling else None}
        made_of = {MODEL: source.model, SIDECARS: source.sidecars}
        if asked.reads_calibration(task):
            made_of["calibrate"] = ws.require("calibrate").result
        if there and (record := ws.record("export")) and record.dropped:
            ws.forget("export")
        with run.stage("export", recorded, made_of) as work:
            if work:
                copies = check_model(run, asked)
                if not task.causal:
                    copies = crossed_on_copy(model.model, _form(run, asked), work)
                if source.wrapper:
                    work.note(
                        f"{source.wrapper} is multimodal: its language model is exported; left to you are "
                        f"{', '.join(source.towers) or 'nothing else'}."
                    )
                if asked.embeds and (unseen := not_given(model.model)):
                    work.note(unseen)
                check_disk(ws, sizes_of_source(source), RunSettings.of(exporting=asked), ["export"])
                exported = _export_torch if asked.exported_by == "torch" else _export_elsewhere
                files, float32 = exported(run, asked, work)
                write_json(ws.export_summary, to_json(ExportSummary(tuple(float32), copies)))
                work.files = [*files, ws.export_summary, *_save_configs(run, files, asked)]
        return ws.baseline


def check_export(source: ModelSource | None, settings: ExportSettings) -> None:
    """Refuse, before any work, an exporter that is not here, what reads a model in another way than it is read here,
    and what does not run here.
    """
    elsewhere = settings.exported_by != "torch"
    exporter = find_exporter(settings.exported_by, settings.exporter_python) if elsewhere else None
    if source is None:
        return
    if exporter is not None and source.gguf_file is None:
        check_known(exporter, Path(source.path))
    if source.wrapper and settings.exported_by != "torch":
        raise InputError(
            f"--exporter {settings.exported_by} reads a multimodal model ({source.wrapper}) in its own way: leave it "
            "out."
        )
    check_processor(source)


def not_given(model: torch.nn.Module) -> str:
    """What a graph that reads embeddings does not get of ``model``, in one sentence; nothing if it gets all."""
    if not accepts(backbone(model), LATER):
        return ""
    return (
        f"{type(model).__name__} adds features of images after its first layers (deepstack), for which the graph has "
        "no inputs: its logits are the model's for text, and others for images."
    )


def check_model(run: Run, settings: ExportSettings) -> tuple[OnCopy, ...]:
    """Refuse, before any work, a model that cannot be exported with these ``settings``.

    Returns the lengths of a decoder that were crossed on a copy of it, if it is exported here. A run checks a decoder
    once, before its work, and exports it at the end.
    """
    task, model = run.model.task, run.model.tried
    if settings.exported_by != "torch" or not task.causal:
        check_supported(model, task=task, pooled=run.model.pooling is not None)
        return ()
    if settings.precision not in (None, "fp32"):
        check_precision(model, str(settings.precision))
    if run.checked is None or run.checked[0] != settings:
        run.checked = settings, check_form(model, _form(run, settings), run.listener)
    return run.checked[1]


def _form(run: Run, settings: ExportSettings) -> Form:
    model = run.model
    if not model.task.causal:
        inputs = load_probe(run.workspace.probe).inputs
        return _of_opset(encoder_form(model.model, model.task, model.pooling, inputs), settings)
    form = _of_opset(FORMS[str(settings.kv_cache)], settings)
    # Of the forms of experts, onnxruntime's operator alone has integers.
    form = replace(form, experts=MOE if settings.quantized else settings.experts or form.experts)
    return reading_embeds(form, model.model) if settings.embeds else form


def _of_opset(form: Form, settings: ExportSettings) -> Form:
    return replace(form, opset=settings.opset or min(form.opset, OPSETS[str(settings.kv_cache)]))


def _export_torch(
    run: Run, settings: ExportSettings, listener: Listener
) -> tuple[list[Path], list[Float32Node]]:
    ws, model, precision = run.workspace, run.model.model, precision_of(str(settings.precision))
    form, loader, rows = _form(run, settings), loader_for(run.model.source), []
    if precision.name == "fp16":
        rows = loader.ranges(model, loader.load(loader.path(ws)), form.inputs)
    beside: list[Path] = []
    if settings.embeds:
        made = _of_opset(embedding_form(model), settings)
        tokens = [row for row in rows if not isinstance(row, Mapping)]
        embedding = trace(model, made, listener)
        save_in_precision(embedding, ws.embedding, precision, tokens, made.outputs, listener=listener)
        beside = add_features(ws.embedding, placeholders(model))
    graph = trace(model, form, listener)
    set_folder(graph, ws.baseline.parent)
    wide = {*form.outputs, PIXELS, EMBEDDINGS, PER_LAYER}
    files, float32 = save_in_precision(graph, ws.baseline, precision, rows, wide, [ws.model], listener)
    return [*files, *beside], float32


def _export_elsewhere(
    run: Run, settings: ExportSettings, listener: Listener
) -> tuple[list[Path], list[Float32Node]]:
    """Export with another project's exporter, which reads the model from a Hugging Face folder."""
    ws, trust = run.workspace, run.model.source.trust_remote_code
    with tempfile.TemporaryDirectory(prefix=".model.", suffix=TEMPORARY, dir=ws.root) as folder:
        model = as_hf_folder(run.model, Path(folder))
        exporter, precision = (
            find_exporter(settings.exported_by, settings.exporter_python),
            str(settings.precision),
        )
        files = export_with(exporter, model, ws.baseline.parent, precision, listener, trust, [ws.model])
    return sorted({*files, *add_num_logits_input_to_file(ws.baseline)}), []


def _save_configs(run: Run, exported: list[Path], settings: ExportSettings) -> list[Path]:
    """Write the configuration and tokenizer files that the exporter did not write itself."""
    loaded, target = run.model, run.workspace.baseline.parent
    model: Any = loaded.model
    names, written = {path.name for path in exported}, []
    has_tokenizer = any(name.startswith("tokenizer") for name in names)
    with tempfile.TemporaryDirectory(prefix=".configs.", suffix=TEMPORARY, dir=target) as temporary:
        folder = Path(temporary)
        with quiet():
            model.config.save_pretrained(folder)
            if generation := getattr(model, "generation_config", None):
                generation.save_pretrained(folder)
            save_tokenizer(
                loaded.tokenizer if loaded.source.reads == TOKENS else loaded.image_processor, folder
            )
        if told := _genai(model, settings):
            write_json(folder / GENAI, told)
        for path in sorted(folder.iterdir()):
            ours = path.name in ("config.json", "generation_config.json", GENAI) or not has_tokenizer
            if ours and path.name not in names:
                publish(path, target / path.name)
                written.append(target / path.name)
    for name in loaded.pooling.files if loaded.pooling else ():
        (target / name).parent.mkdir(exist_ok=True)
        with atomic_path(target / name) as copy:
            shutil.copyfile(Path(loaded.source.path) / name, copy)
        written.append(target / name)
    return written


def _genai(model: Any, settings: ExportSettings) -> dict[str, Any] | None:
    """The configuration for onnxruntime-genai, which knows no write_indices, and layers of one shape alone."""
    if settings.exported_by != "torch" or settings.kv_cache not in ("shared", "concat"):
        return None
    shapes, shared = list(cache_shapes(model).values()), settings.kv_cache == "shared"
    if len({(s.heads, s.key_size, s.value_size) for s in shapes}) != 1:
        return None
    text, generation = model.config.get_text_config(), getattr(model, "generation_config", None)
    known = genai_config(text, len(shapes), shapes[0].heads, shapes[0].key_size, shared, generation)
    if settings.embeds:
        whole, rows = whole_config(model), position_rows(model)
        known = with_embeds(known, whole, placeholders(model), rows, has_per_layer(backbone(model)))
    return with_states(known, dummy_run(model).cache)
