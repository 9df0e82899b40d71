"""Export with mobius: graphs that are built of ONNX operators by a description of each family, not traced."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nbl_export.export.child import Exporter, export_in_child, require
from nbl_export.parts import part
from nbl_export.progress import Listener

# What it calls our precisions.
DTYPES = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}


def _mobius() -> Exporter:
    one = part("mobius-onnx")
    return Exporter("mobius", one.module, f"install it with `{one.pip}`")


def require_mobius() -> None:
    """Raise :class:`MissingDependencyError` unless it is installed in this environment."""
    require(_mobius(), sys.executable)


def export_mobius(
    model: Path,
    target: Path,
    precision: str,
    listener: Listener,
    trust_remote_code: bool = False,
    readers: Sequence[Path] = (),
) -> list[Path]:
    """Export the Hugging Face folder ``model`` to ``target/model.onnx``; returns the files written.

    ``precision`` is one of :data:`DTYPES`. The files are the graph, its data, ``genai_config.json`` and the tokenizer.
    Raises :class:`MissingDependencyError` or :class:`BuildError`.
    """

    def arguments(folder: Path) -> list[str]:
        remote = ["--trust-remote-code"] if trust_remote_code else []
        told = ["--config", str(model.resolve()), "--dtype", DTYPES[precision], "--runtime", "ort-genai"]
        return ["build", *told, *remote, str(folder)]

    return export_in_child(_mobius(), sys.executable, model, target, arguments, listener, readers)
