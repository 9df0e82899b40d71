"""Operators that ``torch.export`` cannot express, and sums that torch.onnx would drop."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

from nbl_export.models.replacing import replaced

# Such operators are emitted in a private domain and renamed afterwards. Otherwise the exporter would use opset 24 for
# the full graph, where it decomposes norms and rotary embeddings.
SYMBOLIC_DOMAIN = "nbl_export"


@contextmanager
def small_numbers_kept() -> Iterator[None]:
    """Within the block, what torch.onnx simplifies keeps sums with numbers of 1e-8 and less.

    onnxscript takes them for zero and drops the sum. Such is the epsilon of the norms of Helium and Moshi, without
    which the norm of a token whose embedding is zero, as that of padding, is NaN.
    """
    matcher: Any = None
    with suppress(ImportError):  # another release of onnxscript
        matcher = importlib.import_module("onnxscript.rewriter._matcher")
    if not hasattr(matcher, "math"):
        yield
        return
    with replaced(matcher, "math", SimpleNamespace(isclose=_relatively_close)):
        yield


def _relatively_close(a: float, b: float, *, rel_tol: float = 1e-9, **_: float) -> bool:
    return math.isclose(a, b, rel_tol=rel_tol)
