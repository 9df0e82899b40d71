"""A model as a Hugging Face folder that another process loads as the same model with transformers 4 or 5.

The differences between the two are handled in :mod:`nbl_export.models.compat`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.models.compat import make_readable, readable_folder
from nbl_export.models.load import quiet
from nbl_export.models.weights import resident

if TYPE_CHECKING:
    from nbl_export.models.loaded import LoadedModel


def as_hf_folder(model: LoadedModel, folder: Path) -> Path:
    """``model`` as a folder for both major versions of transformers: its own folder if possible, else ``folder``.

    ``folder`` (new or empty, deleted by the caller) gets links to the weights, or the dequantized weights of a
    GGUF file in float32. The source folder and the loaded model are not changed.
    """
    if model.source.gguf_file is None:
        return readable_folder(Path(model.source.path), folder)
    folder.mkdir(parents=True, exist_ok=True)
    _save(model, folder)
    make_readable(folder)
    return folder


def _save(model: LoadedModel, folder: Path) -> None:
    loaded: Any = model.model
    before = dict(vars(loaded.config))
    try:
        with quiet(), resident(loaded):
            loaded.save_pretrained(folder)  # this changes the configuration
            model.tokenizer.save_pretrained(folder)
    finally:
        vars(loaded.config).clear()
        vars(loaded.config).update(before)
