"""Text → moments and probe."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.calibrate.text import TextSettings
from nbl_export.errors import InputError
from nbl_export.progress import Listener
from nbl_export.run import Run
from nbl_export.settings import CalibrateSettings
from nbl_export.workspace import Workspace, read_json, sha256_of_json, write_json

if TYPE_CHECKING:
    import torch

    from nbl_export.calibrate.text import CalibrationText


def calibrate(run: Run, settings: CalibrateSettings) -> None:
    """Text → moments and probe."""
    from nbl_export.calibrate.collect import Checkpoint, collect_moments
    from nbl_export.calibrate.moments import save_moments
    from nbl_export.calibrate.probe import probe_model, save_probe
    from nbl_export.calibrate.text import save_text
    from nbl_export.models.layers import layer_count
    from nbl_export.models.trial import check_served

    settings.check()
    ws, fingerprint = run.workspace, run.model.source.fingerprint
    key = sha256_of_json({"model": fingerprint, "text": asdict(settings), "files": _stamps(settings.sources)})

    def work(listener: Listener) -> list[Path]:
        model = run.model.model
        check_served(model, cached=False)  # a graph without a cache can be made of it, if no other
        _check_room(ws, model)
        text = _kept_text(ws, key)
        if text is None:
            text = _read_text(run, settings, listener)
            save_text(ws.text, text)
            write_json(_text_record(ws), {"key": key})
        tokens = text.calibration
        _check_enough(tokens.size, model)
        moments = collect_moments(model, tokens, fingerprint, Checkpoint(ws.checkpoint), listener)
        known = {"model": fingerprint, "tokens": int(tokens.size), "blocks": layer_count(model)}
        save_moments(ws.moments, moments, known)
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
