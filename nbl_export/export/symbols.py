"""Operators that ``torch.export`` cannot express, and functions that are replaced while a model is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Such operators are emitted in a private domain and renamed afterwards. Otherwise the exporter would use opset 24 for
# the full graph, where it decomposes norms and rotary embeddings.
SYMBOLIC_DOMAIN = "nbl_export"


@contextmanager
def replaced(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block, ``owner`` (a module or a class) has ``function`` under that name."""
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)
