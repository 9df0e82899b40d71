"""Calibration and held-out data by task: text for a decoder, passages or images for an encoder.

Each kind of data is a class of :data:`_KINDS`; the stages use it and do not depend on the task.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import EMBEDDINGS, MASK, PIXELS, TOKEN_TYPES, TOKENS, are_media, batch_of_rows, words
from nbl_export.calibrate.documents import (
    check_readable,
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
from nbl_export.models.folder import PREPROCESSOR, task_named
from nbl_export.models.layers import positions
from nbl_export.models.lengths import crossed_by, crossing_prompts
from nbl_export.models.running import accepts
from nbl_export.models.source import ModelIdentity, ModelSource
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings
from nbl_export.settings.choices import SELF
from nbl_export.workspace import Places

if TYPE_CHECKING:
    import torch

    from nbl_export.models.load import LoadedModel

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
        if settings.sources == (SELF,):
            text = sample_from_model(model.in_dtype(settings.dtype), model.tokenizer, settings, listener)
            return _known(model, text)
        towers: list[Any] = []

        def see(document: Document) -> Any:
            from nbl_export.models.towers import Towers

            if not towers:
                towers.append(Towers(model.source))
            images = [open_image(file) for file in document.images]
            return towers[0].read(document.text, images, document.where)

        found = documents(settings.sources, settings.field, document_of if model.source.wrapper else field_of)
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
        texts = documents(settings.sources, settings.field)
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


def _heldout_images(images: Any, _names: Iterable[str]) -> Rows:
    return [{PIXELS: image[None]} for image in images.heldout]


class _Images(CalibrationLoader):
    """Images for a vision encoder."""

    unit = "images"
    save, load, heldout = staticmethod(save_images), staticmethod(load_images), staticmethod(_heldout_images)

    def read(self, model: LoadedModel, settings: CalibrateSettings, listener: Listener) -> Any:
        return read_images(image_files(settings.sources), model.image_processor, settings, listener)

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
    if SELF not in settings.sources:
        if unit == _Images.unit:
            image_files(settings.sources)
        else:
            check_readable(settings.sources, settings.field, document_of if source.wrapper else field_of)
    elif not task_named(source.task).causal:
        raise InputError(
            f"{source.source} is an encoder and cannot generate its own calibration {unit}: name some with "
            "--calibration."
        )


def files_of(source: ModelSource, settings: CalibrateSettings) -> list[Path]:
    """The local files that are read: those of the sources, and what they name for a multimodal model."""
    if loader_for(source).unit == _Images.unit:
        return image_files(settings.sources)
    files = [file for one in settings.sources if one != SELF for file in local_files(one) or []]
    return files + images_in(settings.sources, settings.field) if source.wrapper else files
