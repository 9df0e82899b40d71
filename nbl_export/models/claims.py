"""What a model's configuration claims of its size, before anything is built: a bound for what can be asked of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbl_export.models.limits import check_gguf
from nbl_export.models.load import load_config
from nbl_export.models.source import ModelSource


@dataclass(frozen=True)
class Claims:
    """How many ``layers`` a model has, of any kind, and the ``width`` of its residual stream; None if not said."""

    layers: int | None
    width: int | None


def claims_of(source: ModelSource) -> Claims:
    """The claims of a model that was found, whose folder is held to its bytes by then.

    They are those that :mod:`.layers` goes by later: the configuration as transformers reads it, of a GGUF file the
    numbers of its header. Raises :class:`InputError` for an architecture that transformers does not know, and for code
    that comes with a model and may not run.
    """
    if source.gguf_file:
        numbers = check_gguf(Path(source.path) / source.gguf_file)
        found = {
            key: [value for name, value in numbers.items() if name.endswith(f".{key}")]
            for key in ("block_count", "embedding_length")
        }
        return Claims(*(values[0] if len(values) == 1 else None for values in found.values()))
    config = load_config(source)
    return Claims(_number(config, "num_hidden_layers"), _number(config, "hidden_size"))


def _number(config: Any, key: str) -> int | None:
    """A number of the language model's configuration; what is not said in a way we know, the model will show."""
    try:
        found = getattr(config.get_text_config(), key, None)
    except Exception:  # a configuration's own code may raise anything
        return None
    return found if type(found) is int and found > 0 else None
