"""The image processor of a model, and whether a folder has what makes the model's inputs: that, or a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbl_export.batch.names import PIXELS
from nbl_export.errors import InputError
from nbl_export.models.load import load_tokenizer, quiet, unreadable
from nbl_export.models.source import ModelSource
from nbl_export.models.tokenizer_limits import has_vocabulary
from nbl_export.packages import missing

PREPROCESSOR = "preprocessor_config.json"


def check_processor(source: ModelSource) -> None:
    """Refuse, before the model is read, one without the files of its tokenizer or image processor."""
    if source.reads == PIXELS:
        _check_preprocessor(source)
    elif not source.gguf_file and not has_vocabulary(Path(source.path)):
        load_tokenizer(source)  # some need no file


def load_image_processor(source: ModelSource) -> Any:
    """The model's image processor, or an error with the reason why it cannot be loaded."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise missing("pillow", "Reading images") from None
    from transformers import AutoImageProcessor

    _check_preprocessor(source)
    with quiet():
        try:
            return AutoImageProcessor.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
        except BaseException as error:
            raise unreadable(
                f"No image processor can be loaded from {source.source}", source, error
            ) from error


def _check_preprocessor(source: ModelSource) -> None:
    if not (Path(source.path) / PREPROCESSOR).is_file():
        raise InputError(
            f"{source.source} has no {PREPROCESSOR}, which says how its images are scaled: add the one that the "
            "model was trained with."
        )
