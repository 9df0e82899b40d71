"""Text or images → moments and probe."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.errors import InputError
from nbl_export.files import read_json, sha256_of_file, sha256_of_json, user_path, write_json
from nbl_export.models.source import ModelSource, check_apart
from nbl_export.progress import Listener
from nbl_export.ranks import together
from nbl_export.records import MODEL, key_of
from nbl_export.settings import CalibrateSettings, RunSettings
from nbl_export.settings.definition import bytes_of
from nbl_export.stages.needs import check_disk, sizes_of_source
from nbl_export.stages.run import Run, opened
from nbl_export.workspace import check_place

if TYPE_CHECKING:
    import torch

    from nbl_export.calibrate.probe import Probe
    from nbl_export.models.media_tokens import MediaTokens
    from nbl_export.stages.calibration_data import CalibrationLoader


def calibrate(
    model: str | Path,
    out: str | Path | Run,
    settings: CalibrateSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Path:
    """Stream the moments of ``model``'s attention layers; returns the path of the moments.

    ``out`` is the output folder, or a run of the model.
    """
    import torch

    from nbl_export.calibrate.collect import identity_of, moments_of
    from nbl_export.calibrate.moments import MomentsFolder
    from nbl_export.calibrate.text import MEDIA
    from nbl_export.models.candidates import check_blocks, check_supported, described
    from nbl_export.models.media_tokens import seeing
    from nbl_export.models.weights import dtype_of
    from nbl_export.stages.calibration_data import files_of, loader_for

    asked, check = settings or CalibrateSettings(), partial(check_calibration, str(out))
    with together() as ranks:
        if not isinstance(out, Run):
            ranks.shared(lambda: check_text(str(model), asked))
        with opened(
            out, asked, listener, trust_remote_code, rehash, check, model, new=True, several=True
        ) as (run, _):
            ws, source = run.workspace, run.model.source
            loader, recorded = loader_for(source), asked.as_json()
            stamps = ranks.shared(
                # A changed text changes the key, a new modification time does not.
                lambda: sha256_of_json([(str(f), ws.digests.of(f)) for f in files_of(source, asked)])
            )
            made_of, device = {MODEL: source.model, loader.unit: stamps}, run.on(asked.device)
            key = key_of("calibrate", recorded, made_of)
            with run.stage("calibrate", recorded, made_of, device) as work:
                if not work:
                    return ws.moments
                tried, made = run.model.tried, list[torch.nn.Module]()
                # A graph without a cache can be exported, even if one with a cache cannot.
                pooled = run.model.pooling is not None
                check_supported(tried, cached=False, task=run.model.task, pooled=pooled)
                check_blocks(tried, asked.parts)

                def converted() -> str:
                    made.append(run.model.in_dtype(asked.dtype))
                    return dtype_of(made[0])

                dtype = ranks.shared(converted)
                in_dtype = made[0] if made else run.model.in_dtype(dtype)
                tokens, seen = ranks.shared(lambda: _prepared(run, asked, loader, key, work))
                about = {
                    "model": source.fingerprint,
                    "tokens": _token_count(tokens, tried),
                    "dtype": dtype_of(in_dtype),
                    "identity": identity_of(in_dtype, tokens, key),
                    **described(tried),
                }
                store = MomentsFolder(ws.moments, ws.partial_moments, about)
                memory = None if asked.memory is None else bytes_of(asked.memory)
                with seeing(in_dtype, seen):
                    for block, layer in moments_of(
                        in_dtype,
                        tokens,
                        asked.parts,
                        work,
                        known=store.has,
                        folder=ws.partial_moments,
                        identity=about["identity"],
                        ranks=ranks,
                        memory=memory,
                    ):
                        store.put(block, layer)
                if ranks.first:
                    beside = [] if seen is None else [loader.path(ws).with_name(MEDIA)]
                    work.files = [loader.path(ws), *beside, *store.publish(), ws.probe]
        return ws.moments


def check_text(model: str, settings: CalibrateSettings) -> None:
    """Refuse calibration text that is not there, before a model is fetched for it."""
    from nbl_export.calibrate.documents import check_there

    if not user_path(model, "MODEL").exists():
        for source in settings.sources:
            check_there(source)


def check_calibration(out: str | Path, source: ModelSource, settings: CalibrateSettings) -> Any:
    """Refuse, by the model's small files, what no calibration of ``source`` into ``out`` can be asked.

    Returns the configuration of the language model; None for a GGUF file, whose own is read with its weights.
    """
    from nbl_export.models.load import check_processor
    from nbl_export.models.stored import load_config
    from nbl_export.stages.calibration_data import check_sources

    check_apart(source, Path(out))
    check_place(Path(out))
    check_sources(source, settings)
    check_processor(source)
    return None if source.gguf_file else load_config(source).get_text_config()


def _prepared(
    run: Run, settings: CalibrateSettings, loader: CalibrationLoader, key: str, listener: Listener
) -> tuple[Any, MediaTokens | None]:
    """The rows of a calibration and what stands in them for images, on the disk; and the probe is there."""
    from nbl_export.calibrate.probe import save_probe

    model, path = run.model, loader.path(run.workspace)
    whole = RunSettings.of(calibration=settings)
    check_disk(run.workspace, sizes_of_source(model.source, model.model), whole, ["calibrate"])
    data = _load_saved(path, key, loader)
    if data is None:
        data = loader.read(model, settings, listener)
        loader.save(path, data)
        write_json(path.with_suffix(".json"), {"key": key, "sha256": sha256_of_file(path)})
    _check_enough(data.calibration, model.model, loader.unit)
    with listener.task("Recording the probe", 1, "probe") as task:
        probe = loader.probe(model, data, settings.parts)
        task.advance(1)
    if not model.task.causal:
        _check_exports(run, probe)
    save_probe(run.workspace.probe, probe)
    return data.calibration, getattr(data, "media", None)


def _check_exports(run: Run, probe: Probe) -> None:
    """Refuse an encoder that cannot be exported before the long work of calibration: there are many kinds."""
    from nbl_export.export.checks import crossed_on_copy
    from nbl_export.export.forms import encoder_form
    from nbl_export.export.torch import check_traces

    model = run.model
    form = encoder_form(model.model, model.task, model.pooling, probe.inputs)
    check_traces(model.model, form)
    crossed_on_copy(model.model, form, run.listener)


def _load_saved(path: Path, key: str, loader: CalibrationLoader) -> Any:
    """The data of an interrupted calibration with the same settings; None if there is none, or if it is damaged."""
    try:
        record = read_json(path.with_suffix(".json"), "The record of the calibration data", "")
        return loader.load(path) if record == {"key": key, "sha256": sha256_of_file(path)} else None
    except (InputError, OSError):
        return None


def _token_count(rows: Any, model: torch.nn.Module) -> int:
    from nbl_export.models.dummy_run import dummy_run

    return int(rows.size if rows.ndim == 2 else len(rows) * dummy_run(model).tokens)


def _check_enough(rows: Any, model: torch.nn.Module, unit: str) -> None:
    from nbl_export.models.layers import hidden_size

    d = hidden_size(model)
    tokens = _token_count(rows, model)
    if tokens < d + 1:
        options = "--samples or --seq-len" if rows.ndim == 2 else "--samples"
        raise InputError(
            f"{tokens:,} calibration tokens are too few for a model of width {d}: at least {d + 1:,} are needed, "
            f"{20 * d:,} or more are advised; give more {unit}, or raise {options}."
        )
