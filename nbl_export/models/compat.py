"""What the releases of transformers that are served spell differently, told apart by what they hand over.

One function for each difference; nothing else here or elsewhere asks for a version.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def cache_argument(model: torch.nn.Module) -> str:
    """The name of the KV-cache argument of ``forward``: it was renamed within transformers 5."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def query_length(told: Any) -> Any:
    """How many queries a cache or mask function is asked for: transformers 4 and 5.0 tell their places [sequence]."""
    return told.shape[0] if hasattr(told, "shape") else told
