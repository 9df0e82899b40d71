"""A model as a Hugging Face folder that another process, with transformers 4 or 5, loads as the same model.

What the two spell differently is in :mod:`nbl_export.models.compat`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.models.compat import make_readable, readable_folder
from nbl_export.models.load import quiet

if TYPE_CHECKING:
    from nbl_export.models.loaded import LoadedModel


def as_hf_folder(model: LoadedModel, folder: Path) -> Path:
    """``model`` as a folder for both majors of transformers: its own where that will do, else ``folder``.

    ``folder`` (new or empty, the caller's to delete) gets links to the weights, or the de-quantized
    weights of a GGUF file in float32. The source is never written to, the loaded model never changed.
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
        with quiet():
            loaded.save_pretrained(folder)  # writes down in the configuration what it saved
            model.tokenizer.save_pretrained(folder)
    finally:
        vars(loaded.config).clear()
        vars(loaded.config).update(before)
