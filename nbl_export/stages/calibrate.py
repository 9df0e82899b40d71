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
from nbl_export.settings import CalibrateSettings
from nbl_export.settings.definition import bytes_of
from nbl_export.stage_record import MODEL, key_of
from nbl_export.stages.needs import check_disk, disk_to_calibrate, sizes_of_source
from nbl_export.stages.run import Run, check_machine, started
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
    asked = settings or CalibrateSettings()
    if isinstance(out, Run):
        _calibrate(out, asked)
        return out.workspace.moments
    asked.check()
    check_machine(asked)
    check = partial(check_calibration, out=Path(out), settings=asked)
    with together() as ranks:
        ranks.shared(lambda: check_text(str(model), asked))
        with started(model, out, check, listener, trust_remote_code, rehash, ranks) as run:
            _calibrate(run, asked)
    return run.workspace.moments


def check_text(model: str, settings: CalibrateSettings) -> None:
    """Refuse calibration text that is not there, before a model is fetched for it."""
    from nbl_export.calibrate.documents import check_there

    if not user_path(model, "MODEL").exists():
        for source in settings.sources:
            check_there(source)


def check_calibration(source: ModelSource, out: Path, settings: CalibrateSettings) -> Any:
    """Refuse, by the model's small files, what no calibration of ``source`` into ``out`` can be asked.

    Returns the configuration of the language model; None for a GGUF file, whose own is read with its weights.
    """
    from nbl_export.models.load import check_processor, load_config
    from nbl_export.stages.calibration_data import check_sources

    check_apart(source, out)
    check_place(out)
    check_sources(source, settings)
    check_processor(source)
    return None if source.gguf_file else load_config(source).get_text_config()


def _calibrate(run: Run, settings: CalibrateSettings) -> None:
    from nbl_export.calibrate.collect import identity_of, moments_of
    from nbl_export.calibrate.moments import MomentsFolder
    from nbl_export.calibrate.probe import save_probe
    from nbl_export.calibrate.text import MEDIA
    from nbl_export.models.candidates import check_blocks, described
    from nbl_export.models.dummy_run import check_supported
    from nbl_export.models.media_tokens import seeing
    from nbl_export.models.weights import dtype_of
    from nbl_export.stages.calibration_data import files_of, loader_for

    ws, source = run.workspace, run.model.source
    loader, ranks = loader_for(source), run.ranks
    stamps = ranks.shared(
        # A changed text changes the key, a new modification time does not.
        lambda: sha256_of_json([(str(f), ws.digests.of(f)) for f in files_of(source, settings)])
    )
    made_of = {MODEL: source.model, loader.unit: stamps}
    device, asked = run.on(settings.device), settings.as_json()
    key = key_of("calibrate", asked, made_of)

    def work(listener: Listener) -> list[Path]:
        model = run.model.tried
        # A graph without a cache can be exported, even if one with a cache cannot.
        pooled = run.model.pooling is not None
        check_supported(model, cached=False, task=run.model.task, pooled=pooled)
        check_blocks(model, settings.parts)
        made: list[torch.nn.Module] = []

        def converted() -> str:
            made.append(run.model.in_dtype(settings.dtype))
            return dtype_of(made[0])

        dtype = ranks.shared(converted)
        in_dtype = made[0] if made else run.model.in_dtype(dtype)
        probes: list[Probe] = []
        media: list[MediaTokens | None] = []

        def prepared() -> Any:
            check_disk(ws, [disk_to_calibrate(sizes_of_source(run.model.source), settings)])
            data = _load_saved(loader.path(ws), key, loader)
            if data is None:
                data = loader.read(run.model, settings, listener)
                loader.save(loader.path(ws), data)
                record = {"key": key, "sha256": sha256_of_file(loader.path(ws))}
                write_json(loader.path(ws).with_suffix(".json"), record)
            _check_enough(data.calibration, model, loader.unit)
            with listener.task("Recording the probe", 1, "probe") as task:
                probes.append(loader.probe(run.model, data, settings.parts))
                task.advance(1)
            media.append(getattr(data, "media", None))
            if not run.model.task.causal:
                _check_exports(run, probes[0])
            return data.calibration, media[0]

        tokens, seen = ranks.shared(prepared)
        about = {
            "model": source.fingerprint,
            "tokens": _token_count(tokens, model),
            "dtype": dtype_of(in_dtype),
            "identity": identity_of(in_dtype, tokens, key),
            **described(model),
        }
        store = MomentsFolder(ws.moments, ws.partial_moments, about)
        memory = None if settings.memory is None else bytes_of(settings.memory)
        with seeing(in_dtype, seen):
            for block, layer in moments_of(
                in_dtype,
                tokens,
                settings.parts,
                listener,
                known=store.has,
                folder=ws.partial_moments,
                identity=about["identity"],
                ranks=ranks,
                memory=memory,
            ):
                store.put(block, layer)
        if not ranks.first:
            return []
        save_probe(ws.probe, probes[0])
        beside = [] if seen is None else [loader.path(ws).with_name(MEDIA)]
        return [loader.path(ws), *beside, *store.publish(), ws.probe]

    run.stage("calibrate", asked, made_of, work, device)


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
