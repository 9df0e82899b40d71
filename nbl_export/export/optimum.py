"""Export with optimum in the Python environment that has it: it needs transformers 4.57, not 5."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from nbl_export.export.child import Exporter, export_in_child, require
from nbl_export.parts import part
from nbl_export.progress import Listener

VARIABLE = "NBL_EXPORT_OPTIMUM_PYTHON"


def _optimum() -> Exporter:
    return Exporter(
        "optimum",
        part("optimum-onnx").module,
        # Without accelerate it stores a tied embedding twice.
        f"optimum-onnx needs transformers < 4.58, so install it with `{part('optimum-onnx').pip}`, or to keep "
        "transformers 5 here make an environment for it (`python -m venv E; E/bin/pip install optimum-onnx onnxruntime "
        f"onnxscript accelerate`) and name its python, E/bin/python, in {VARIABLE}",
    )


def find_optimum(python: str | None = None) -> str:
    """The Python that runs optimum: ``python``, else the one named by ``NBL_EXPORT_OPTIMUM_PYTHON``, else this one.

    Raises :class:`MissingDependencyError` if optimum's exporter is not installed.
    """
    found = python or os.environ.get(VARIABLE) or sys.executable
    require(_optimum(), found)
    return found


def export_optimum(
    model: Path,
    target: Path,
    python: str,
    listener: Listener,
    trust_remote_code: bool = False,
    readers: Sequence[Path] = (),
) -> list[Path]:
    """Export the Hugging Face folder ``model`` to ``target/model.onnx`` in float32; returns the files written.

    Like ``optimum-cli export onnx`` for generation: one graph with a KV cache, tied weights stored once, the
    result compared with PyTorch. Raises :class:`MissingDependencyError` or :class:`BuildError`.
    """

    def arguments(folder: Path) -> list[str]:
        remote = ["--trust-remote-code"] if trust_remote_code else []
        return ["-m", str(model.resolve()), "--task", "text-generation-with-past", *remote, str(folder)]

    return export_in_child(_optimum(), python, model, target, arguments, listener, readers)
