"""Read text or images, and stream them through the model into moments and a probe.

Each kind of data is a class of :data:`_KINDS`; the stages use it and do not depend on the task.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch import EMBEDDINGS, MASK, PIXELS, TOKEN_TYPES, TOKENS, are_media, batch_of_rows, words
from nbl_export.calibrate.collect import identity_of, moments_of
from nbl_export.calibrate.documents import (
    check_readable,
    check_there,
    document_of,
    documents,
    field_of,
    image_files,
    images_in,
    load_images,
    local_files,
    open_image,
    read_images,
    save_images,
)
from nbl_export.calibrate.moments import MomentsFolder
from nbl_export.calibrate.probe import (
    Probe,
    probe_inputs,
    probe_lengths,
    probe_model,
    save_probe,
    tokens_beyond,
)
from nbl_export.calibrate.sampling import sample_from_model
from nbl_export.calibrate.text import (
    MEDIA,
    CalibrationText,
    Document,
    check_tokens,
    frame_of,
    heldout_rows,
    load_text,
    longest_row,
    pack,
    read_passages,
    save_text,
)
from nbl_export.errors import InputError, first_line
from nbl_export.export.checks import crossed_on_copy
from nbl_export.export.forms import encoder_form
from nbl_export.export.torch import check_traces
from nbl_export.files import read_json, sha256_of_file, sha256_of_json, user_path, write_json
from nbl_export.models.candidates import check_blocks, check_supported, described
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.folder import PREPROCESSOR, task_named
from nbl_export.models.layers import hidden_size, positions
from nbl_export.models.lengths import crossed_by, crossing_prompts
from nbl_export.models.load import LoadedModel, check_processor
from nbl_export.models.media_tokens import MediaTokens, seeing
from nbl_export.models.running import accepts
from nbl_export.models.source import ModelIdentity, ModelSource, check_apart
from nbl_export.models.stored import load_config
from nbl_export.models.towers import Towers
from nbl_export.models.weights import dtype_of
from nbl_export.progress import Listener
from nbl_export.ranks import together
from nbl_export.records import MODEL, key_of
from nbl_export.settings import CalibrateSettings, RunSettings
from nbl_export.settings.choices import SELF
from nbl_export.settings.definition import bytes_of
from nbl_export.stages.needs import check_disk, sizes_of_source
from nbl_export.stages.run import Run, opened
from nbl_export.workspace import Places, check_place


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
                    made.append(run.model.in_dtype(asked.calibration_dtype))
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
                        run.listener,  # that it goes on where it was killed is said, and not recorded
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
    if not user_path(model, "MODEL").exists():
        for source in settings.calibration:
            check_there(source)


def check_calibration(out: str | Path, source: ModelSource, settings: CalibrateSettings) -> Any:
    """Refuse, by the model's small files, what no calibration of ``source`` into ``out`` can be asked.

    Returns the configuration of the language model; None for a GGUF file, whose own is read with its weights.
    """
    check_apart(source, Path(out))
    check_place(Path(out))
    check_sources(source, settings)
    check_processor(source)
    return None if source.gguf_file else load_config(source).get_text_config()


def _prepared(
    run: Run, settings: CalibrateSettings, loader: CalibrationLoader, key: str, listener: Listener
) -> tuple[Any, MediaTokens | None]:
    """The rows of a calibration and what stands in them for images, on the disk; and the probe is there."""
    model, path = run.model, loader.path(run.workspace)
    whole = RunSettings.of(calibration=settings)
    check_disk(run.workspace, sizes_of_source(model.source, model.model), whole, ["calibrate"])
    known, data = path.with_suffix(".json"), None
    # Of an interrupted calibration with the same settings; there may be none, or it is damaged.
    with suppress(InputError, OSError):
        record = read_json(known, "The record of the calibration data", "")
        if record == {"key": key, "sha256": sha256_of_file(path)}:
            data = loader.load(path)
    if data is None:
        data = loader.read(model, settings, listener)
        loader.save(path, data)
        write_json(known, {"key": key, "sha256": sha256_of_file(path)})
    width, tokens = hidden_size(model.model), _token_count(data.calibration, model.model)
    if tokens < width + 1:
        options = "--samples or --seq-len" if data.calibration.ndim == 2 else "--samples"
        raise InputError(
            f"{tokens:,} calibration tokens are too few for a model of width {width}: at least {width + 1:,} are "
            f"needed, {20 * width:,} or more are advised; give more {loader.unit}, or raise {options}."
        )
    with listener.task("Recording the probe", 1, "probe") as task:
        probe = loader.probe(model, data, settings.parts)
        task.advance(1)
    if not model.task.causal:  # there are many kinds: what cannot be exported is refused before the long work
        form = encoder_form(model.model, model.task, model.pooling, probe.inputs)
        check_traces(model.model, form)
        crossed_on_copy(model.model, form, run.listener)
    save_probe(run.workspace.probe, probe)
    return data.calibration, getattr(data, "media", None)


def _token_count(rows: Any, model: torch.nn.Module) -> int:
    return int(rows.size if rows.ndim == 2 else len(rows) * dummy_run(model).tokens)


Rows = list[dict[str, NDArray[Any]]]

# The data for measuring the range of each tensor of a graph; this takes seconds.
_RANGE_ROWS, _RANGE_TOKENS = 4, 256


class CalibrationLoader:
    """How text for a decoder is read and saved."""

    unit = "text"
    save: Callable[[Path, Any], None] = staticmethod(save_text)
    load: Callable[[Path], Any] = staticmethod(load_text)
    heldout: Callable[[Any, Iterable[str]], Rows] = staticmethod(heldout_rows)

    def path(self, ws: Places) -> Path:
        """Its file in the output folder."""
        path: Path = getattr(ws, self.unit)
        return path

    def read(self, model: LoadedModel, settings: CalibrateSettings, listener: Listener) -> Any:
        if settings.calibration == (SELF,):
            text = sample_from_model(
                model.in_dtype(settings.calibration_dtype), model.tokenizer, settings, listener
            )
            return _known(model, text)
        towers: list[Any] = []

        def see(document: Document) -> Any:
            if not towers:
                towers.append(Towers(model.source))
            images = [open_image(file) for file in document.images]
            return towers[0].read(document.text, images, document.where)

        found = documents(
            settings.calibration, settings.text_field, document_of if model.source.wrapper else field_of
        )
        return _known(model, pack(found, model.tokenizer, settings, listener, see))

    def probe(self, model: LoadedModel, data: Any, parts: Collection[str]) -> Probe:
        return probe_model(model.in_dtype("float32"), words(data.calibration), parts)

    def ranges(self, model: torch.nn.Module, data: Any, names: Mapping[str, Any]) -> Any:
        """The data for the tensor ranges of float16: token rows, or an encoder's batch of the inputs ``names``.

        Rows with images and sounds are as a graph is given them: their embeddings have ranges of their own.
        """
        rows = [data.prompt(row[:_RANGE_TOKENS]) for row in words(data.calibration)[:_RANGE_ROWS]]
        rows += map(data.prompt, _longer_rows(model, data, rows, len(data.start)))
        there = [row for row in data.calibration if are_media(row).any()] if EMBEDDINGS in names else []
        return rows + [data.media.given(row[:_RANGE_TOKENS], model) for row in there[:_RANGE_ROWS]]


class _Passages(CalibrationLoader):
    """Passages for a text encoder."""

    def read(self, model: LoadedModel, settings: CalibrateSettings, listener: Listener) -> Any:
        length = longest_row(settings, model.tokenizer, positions(model.model), listener)
        texts = documents(settings.calibration, settings.text_field)
        return _known(model, read_passages(texts, model.tokenizer, settings, length, listener))

    def probe(self, model: LoadedModel, data: Any, parts: Collection[str]) -> Probe:
        frame, own = frame_of(model.tokenizer), {TOKENS, MASK, *model.tokenizer.model_input_names}
        # The inputs that the tokenizer gives and the model accepts; the graph has no others.
        names = [n for n in (TOKENS, MASK, TOKEN_TYPES) if n in own and accepts(model.model, n)]
        rows = []
        for i, length in enumerate(probe_lengths(data.calibration.shape[1], tokens_beyond(model.model))):
            inner = data.calibration[i % len(data.calibration)][len(frame.start) :]
            rows.append(_row(frame.around(inner[: max(1, length - frame.size)]), names))
        batch = batch_of_rows(rows, frame.pad, frame.left)
        return probe_inputs(model.in_dtype("float32"), {name: batch[name] for name in names}, parts)

    def ranges(self, model: torch.nn.Module, data: Any, names: Mapping[str, Any]) -> Any:
        rows = [row[:_RANGE_TOKENS] for row in data.calibration[:_RANGE_ROWS]]
        return batch_of_rows([_row(ids, names) for ids in (*rows, *_longer_rows(model, data, rows))])


class _Images(CalibrationLoader):
    """Images for a vision encoder."""

    unit = "images"
    save, load, heldout = (
        staticmethod(save_images),
        staticmethod(load_images),
        staticmethod(lambda images, _names: [{PIXELS: image[None]} for image in images.heldout]),
    )

    def read(self, model: LoadedModel, settings: CalibrateSettings, listener: Listener) -> Any:
        return read_images(image_files(settings.calibration), model.image_processor, settings, listener)

    def probe(self, model: LoadedModel, data: Any, parts: Collection[str]) -> Probe:
        try:
            return probe_inputs(model.in_dtype("float32"), {PIXELS: data.calibration[:2]}, parts)
        except InputError as refusal:
            error = refusal.__cause__
            if not isinstance(
                error, ValueError | RuntimeError
            ):  # of a model that gets images of another size
                raise
            raise InputError(
                f"{model.source.source} does not take the images that its {PREPROCESSOR} makes "
                f"({first_line(error)}): correct the sizes in that file."
            ) from error

    def ranges(self, model: torch.nn.Module, data: Any, names: Mapping[str, Any]) -> Any:
        return {PIXELS: data.calibration[:_RANGE_ROWS]}


_KINDS = {
    (True, TOKENS): CalibrationLoader(),
    (False, TOKENS): _Passages(),
    (False, PIXELS): _Images(),
}


def loader_for(source: ModelIdentity) -> CalibrationLoader:
    """The kind for the task and the main input of ``source``."""
    return _KINDS[task_named(source.task).causal, source.reads]


def _known(model: LoadedModel, text: CalibrationText) -> CalibrationText:
    """``text``, whose tokens the model knows."""
    table: Any = model.model.get_input_embeddings()  # type: ignore[operator]
    return check_tokens(text, int(table.weight.shape[0]), model.source.source)


def _longer_rows(model: torch.nn.Module, text: Any, given: Sequence[Any], framed: int = 0) -> list[Any]:
    """Rows of text that go beyond those lengths of ``model`` that no row of those ``given`` does, where there is room:
    what begins there has ranges of its own.
    """
    prompts = crossing_prompts(crossed_by(model, 0, [len(row) for row in given]))
    return [np.resize(words(text.calibration).reshape(-1), max(1, prompt - framed)) for prompt in prompts]


def _row(ids: NDArray[Any], names: Collection[str]) -> dict[str, NDArray[Any]]:
    row = {TOKENS: ids.astype(np.int64)[None]}
    return row | ({TOKEN_TYPES: np.zeros_like(row[TOKENS])} if TOKEN_TYPES in names else {})


def check_sources(source: ModelSource, settings: CalibrateSettings) -> None:
    """Refuse, before any work, ``--calibration self`` for a model that does not generate, and what cannot be read."""
    unit = loader_for(source).unit
    if SELF not in settings.calibration:
        if unit == _Images.unit:
            image_files(settings.calibration)
        else:
            check_readable(
                settings.calibration, settings.text_field, document_of if source.wrapper else field_of
            )
    elif not task_named(source.task).causal:
        raise InputError(
            f"{source.source} is an encoder and cannot generate its own calibration {unit}: name some with "
            "--calibration."
        )


def files_of(source: ModelSource, settings: CalibrateSettings) -> list[Path]:
    """The local files that are read: those of the sources, and what they name for a multimodal model."""
    if loader_for(source).unit == _Images.unit:
        return image_files(settings.calibration)
    files = [file for one in settings.calibration if one != SELF for file in local_files(one) or []]
    return files + images_in(settings.calibration, settings.text_field) if source.wrapper else files
