"""Calibration and held-out data by task: text for a decoder, passages or images for an encoder.

Each kind of data is a row of :data:`_LOADERS`; the stages use it and do not depend on the task.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.media_ids import are_media, words
from nbl_export.batch.names import EMBEDDINGS, MASK, PIXELS, TOKEN_TYPES, TOKENS
from nbl_export.batch.rows import batch_of_rows
from nbl_export.calibrate.documents import check_readable, documents, field_of, local_files
from nbl_export.calibrate.images import (
    document_of,
    image_files,
    images_in,
    load_images,
    open_image,
    read_images,
    save_images,
)
from nbl_export.calibrate.probe import Probe, probe_inputs, probe_lengths, probe_model, tokens_beyond
from nbl_export.calibrate.sampling import sample_from_model
from nbl_export.calibrate.text import (
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
from nbl_export.models.folder import PREPROCESSOR
from nbl_export.models.layers import positions
from nbl_export.models.lengths import crossed_by, crossing_prompts
from nbl_export.models.libraries import accepts
from nbl_export.models.source import ModelIdentity, ModelSource
from nbl_export.models.tasks import task_named
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings
from nbl_export.settings.choices import SELF
from nbl_export.workspace import Places

if TYPE_CHECKING:
    import torch

    from nbl_export.models.loaded import LoadedModel

Rows = list[dict[str, NDArray[Any]]]

# The data for measuring the range of each tensor of a graph; this takes seconds.
_RANGE_ROWS, _RANGE_TOKENS = 4, 256


@dataclass(frozen=True)
class CalibrationLoader:
    """How one kind of calibration data is found, read and saved; ``path`` is its file in the output folder.

    ``check`` refuses sources, with the field of their text, before any work. ``ranges`` gives the data for the tensor
    ranges of float16: token rows, or an encoder's batch, for a model from the data and the names of its inputs.
    ``heldout`` gives the held-out data of an encoder as batches of one.
    """

    unit: str
    path: Callable[[Places], Path]
    files: Callable[[Sequence[str]], list[Path]]
    check: Callable[[Sequence[str], str], object]
    read: Callable[[LoadedModel, CalibrateSettings, Listener], Any]
    save: Callable[[Path, Any], None]
    load: Callable[[Path], Any]
    probe: Callable[[LoadedModel, Any, Collection[str]], Probe]
    ranges: Callable[[torch.nn.Module, Any, Mapping[str, Any]], Any]
    heldout: Callable[[Any, Mapping[str, Any]], Rows] = heldout_rows


def loader_for(source: ModelIdentity) -> CalibrationLoader:
    """The row for the task and the main input of ``source``."""
    return _LOADERS[task_named(source.task).causal, source.reads]


def check_sources(source: ModelSource, settings: CalibrateSettings) -> None:
    """Refuse, before any work, ``--calibration self`` for a model that does not generate, and what cannot be read."""
    loader = loader_for(source)
    if SELF not in settings.sources:
        if source.wrapper:
            check_readable(settings.sources, settings.field, document_of)
        else:
            loader.check(settings.sources, settings.field)
    elif not task_named(source.task).causal:
        raise InputError(
            f"{source.source} is an encoder and cannot generate its own calibration {loader.unit}: name some with "
            "--calibration."
        )


def files_of(source: ModelSource, settings: CalibrateSettings) -> list[Path]:
    """The local files that are read: those of the sources, and what they name for a multimodal model."""
    files = loader_for(source).files(settings.sources)
    return files + images_in(settings.sources, settings.field) if source.wrapper else files


# decoders ----------------------------------------------------------------------------------------


def _text_files(sources: Sequence[str]) -> list[Path]:
    return [file for source in sources if source != SELF for file in local_files(source) or []]


def _read_text(model: LoadedModel, settings: CalibrateSettings, listener: Listener) -> Any:
    if settings.sources == (SELF,):
        text = sample_from_model(model.in_dtype(settings.dtype), model.tokenizer, settings, listener)
        return _embedded(model, text)
    towers: list[Any] = []

    def see(document: Document) -> tuple[NDArray[Any], Any]:
        from nbl_export.models.towers import Towers

        if not towers:
            towers.append(Towers(model.source))
        seen = towers[0].read(document.text, [open_image(file) for file in document.images], document.where)
        return seen.ids, seen.media

    found = documents(settings.sources, settings.field, document_of if model.source.wrapper else field_of)
    return _embedded(model, pack(found, model.tokenizer, settings, listener, see))


def _embedded(model: LoadedModel, text: CalibrationText) -> CalibrationText:
    """``text``, whose tokens the model knows."""
    table: Any = model.model.get_input_embeddings()  # type: ignore[operator]
    return check_tokens(text, int(table.weight.shape[0]), model.source.source)


def _probe_decoder(model: LoadedModel, text: Any, parts: Collection[str]) -> Probe:
    return probe_model(model.in_float32, words(text.calibration), parts)


def _range_rows(model: torch.nn.Module, text: Any, names: Mapping[str, Any]) -> list[Any]:
    rows = [text.prompt(row[:_RANGE_TOKENS]) for row in words(text.calibration)[:_RANGE_ROWS]]
    longer = _longer_rows(model, text, [len(row) for row in rows], len(text.start))
    return [*rows, *map(text.prompt, longer), *(_media_rows(model, text) if EMBEDDINGS in names else ())]


def _media_rows(model: torch.nn.Module, text: Any) -> list[dict[str, NDArray[Any]]]:
    """Rows with images and sounds, as a graph is given them: their embeddings have ranges of their own."""
    there = [row for row in text.calibration if are_media(row).any()]
    return [text.media.given(row[:_RANGE_TOKENS], model) for row in there[:_RANGE_ROWS]]


def _longer_rows(model: torch.nn.Module, text: Any, given: Sequence[int], framed: int = 0) -> list[Any]:
    """Rows of text that go beyond those lengths of ``model`` that no row of those ``given`` does, where there is room:
    what begins there has ranges of its own.
    """
    prompts = crossing_prompts(crossed_by(model, 0, given))
    return [np.resize(words(text.calibration).reshape(-1), max(1, prompt - framed)) for prompt in prompts]


# text encoders -----------------------------------------------------------------------------------


def _read_passages(model: LoadedModel, settings: CalibrateSettings, listener: Listener) -> Any:
    length = longest_row(settings, model.tokenizer, positions(model.model), listener)
    texts = documents(settings.sources, settings.field)
    return _embedded(model, read_passages(texts, model.tokenizer, settings, length, listener))


def _probe_text_encoder(model: LoadedModel, text: Any, parts: Collection[str]) -> Probe:
    frame = frame_of(model.tokenizer)
    own = set(model.tokenizer.model_input_names)
    # The inputs that the tokenizer gives and the model accepts; the graph has no others.
    names = [n for n in (TOKENS, MASK, TOKEN_TYPES) if n in own | {TOKENS, MASK} and accepts(model.model, n)]
    rows = []
    for i, length in enumerate(probe_lengths(text.calibration.shape[1], tokens_beyond(model.model))):
        inner = text.calibration[i % len(text.calibration)][len(frame.start) :]
        ids = frame.around(inner[: max(1, length - frame.size)]).astype(np.int64)[None]
        rows.append({name: ids if name == TOKENS else np.zeros_like(ids) for name in names if name != MASK})
    batch = batch_of_rows(rows, frame.pad, frame.left)
    return probe_inputs(model.in_float32, {name: batch[name] for name in names}, parts)


def _range_batch(model: torch.nn.Module, text: Any, names: Mapping[str, Any]) -> Any:
    rows = [row[:_RANGE_TOKENS] for row in text.calibration[:_RANGE_ROWS]]
    rows += _longer_rows(model, text, [len(row) for row in rows])
    return batch_of_rows([_row(ids[None].astype(np.int64), names) for ids in rows])


def _row(ids: NDArray[Any], names: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    return {TOKENS: ids} | ({TOKEN_TYPES: np.zeros_like(ids)} if TOKEN_TYPES in names else {})


# vision encoders ---------------------------------------------------------------------------------


def _read_images(model: LoadedModel, settings: CalibrateSettings, listener: Listener) -> Any:
    return read_images(image_files(settings.sources), model.image_processor, settings, listener)


def _probe_vision(model: LoadedModel, images: Any, parts: Collection[str]) -> Probe:
    try:
        return probe_inputs(model.in_float32, {PIXELS: images.calibration[:2]}, parts)
    except InputError as refusal:
        error = refusal.__cause__
        if not isinstance(error, ValueError | RuntimeError):  # of a model that gets images of another size
            raise
        raise InputError(
            f"{model.source.source} does not take the images that its {PREPROCESSOR} makes "
            f"({first_line(error)}): correct the sizes in that file."
        ) from error


_LOADERS = {
    (True, TOKENS): CalibrationLoader(
        "text",
        lambda ws: ws.text,
        _text_files,
        check_readable,
        _read_text,
        save_text,
        load_text,
        _probe_decoder,
        _range_rows,
    ),
    (False, TOKENS): CalibrationLoader(
        "text",
        lambda ws: ws.text,
        _text_files,
        check_readable,
        _read_passages,
        save_text,
        load_text,
        _probe_text_encoder,
        _range_batch,
    ),
    (False, PIXELS): CalibrationLoader(
        "images",
        lambda ws: ws.images,
        image_files,
        lambda sources, _field: image_files(sources),
        _read_images,
        save_images,
        load_images,
        _probe_vision,
        lambda _model, images, _names: {PIXELS: images.calibration[:_RANGE_ROWS]},
        lambda images, _names: [{PIXELS: image[None]} for image in images.heldout],
    ),
}
