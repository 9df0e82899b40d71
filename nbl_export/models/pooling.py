"""The pooling of a sentence-transformers folder, read from its JSON files without that package.

modules.json          Transformer, Pooling, optionally Normalize, in this order
1_Pooling/config.json the mode: mean, cls, max or lasttoken over the tokens that are not padding
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.errors import InputError
from nbl_export.files import member, read_json

if TYPE_CHECKING:
    import torch

MODULES = "modules.json"
SENTENCE = "sentence_embedding"
# The names of the modes in the two formats of sentence-transformers, and ours.
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}
_REMEDY = "download the model again"


@dataclass(frozen=True)
class Pooling:
    """``mode`` is mean, cls, max or lasttoken; ``normalize`` scales every vector to length 1.

    ``files`` are the files that define this, relative to the folder.
    """

    mode: str
    normalize: bool
    files: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def find_pooling(folder: Path) -> Pooling | None:
    """The pooling of a sentence-transformers ``folder``; None for a folder without ``modules.json``.

    Raises :class:`InputError` for a module or a mode that is not supported.
    """
    if not (folder / MODULES).is_file():
        return None
    modules = read_json(folder / MODULES, "The list of the model's modules", _REMEDY)
    try:
        named = [(str(m["type"]).rpartition(".")[2], str(m["path"])) for m in modules]
    except (TypeError, KeyError):
        raise InputError(f"{folder / MODULES} is not a list of modules: {_REMEDY}.") from None
    kinds = [kind for kind, _ in named]
    expected = ["Transformer", "Pooling", "Normalize"]
    if kinds != expected[: len(kinds)] or len(kinds) < 2:
        odd = next((k for k in kinds if k not in expected), None)
        found = f"the module {odd}" if odd else f"the modules {', '.join(kinds) or 'none'}"
        raise InputError(
            f"{folder / MODULES} has {found}: supported are a Transformer, its Pooling, and Normalize, in this order."
        )
    path = member(folder, f"{named[1][1]}/config.json", f"The path of the pooling in {MODULES}")
    mode = _mode(path, read_json(path, "The pooling's configuration", _REMEDY))
    files = [MODULES, str(path.relative_to(folder))]
    # Not needed to run, but sentence-transformers reads them.
    files += [p.name for p in sorted(folder.glob("*sentence*.json"))]
    return Pooling(mode, len(kinds) == 3, tuple(files))


def _mode(path: Path, config: Any) -> str:
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a JSON object: {_REMEDY}.")
    named = [str(config["pooling_mode"])] if "pooling_mode" in config else []
    asked = named or [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    modes = [_MODES.get(key, key) for key in asked]
    if len(modes) != 1 or modes[0] not in _MODES.values():
        found = ", ".join(modes) or "none"
        raise InputError(
            f"{path} asks for the pooling {found}: supported is one of mean, cls, max and lasttoken."
        )
    return modes[0]


def pool(pooling: Pooling, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One vector [batch, d] for each row of ``states`` [batch, sequence, d].

    ``mask`` [batch, sequence] is 0 on padding.
    """
    import torch

    if pooling.mode == "cls":
        # The first token that is not padding, since padding may be on the left.
        first = mask.argmax(dim=1)[:, None, None].expand(-1, 1, states.shape[-1])
        vector = states.gather(1, first)[:, 0]
    elif pooling.mode == "lasttoken":
        vector = last_token(states, mask)
    elif pooling.mode == "max":
        hidden = (mask == 0)[..., None]
        vector = states.masked_fill(hidden, torch.finfo(states.dtype).min / 2).amax(dim=1)
    else:
        weights = mask[..., None].to(states.dtype)
        vector = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
    return torch.nn.functional.normalize(vector, dim=-1) if pooling.normalize else vector


def last_token(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The states [batch, d] of each row's last token that is no padding, on whichever side that is."""
    import torch

    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * places).argmax(dim=1)[:, None, None].expand(-1, 1, states.shape[-1])
    return states.gather(1, last)[:, 0]
