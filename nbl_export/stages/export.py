"""Model → ``baseline/model.onnx`` with configuration and tokenizer files beside it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export import __version__
from nbl_export.progress import Listener
from nbl_export.run import Run
from nbl_export.settings import ExportSettings
from nbl_export.workspace import sha256_of_json, write_json

if TYPE_CHECKING:
    from nbl_export.calibrate.text import CalibrationText

# Text on which the reach of each tensor is measured for float16: 1,024 tokens take seconds.
_RANGE_ROWS, _RANGE_TOKENS = 4, 256


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
