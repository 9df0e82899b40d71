"""Export with onnxruntime-genai's model builder: fused operators of onnxruntime, float or quantized weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nbl_export.errors import InputError
from nbl_export.export.child import Exporter, export_in_child, require
from nbl_export.parts import part
from nbl_export.progress import Listener

# The execution provider to build for: fused half-precision operators exist on CUDA only. No build needs a GPU.
PROVIDERS = {"fp32": "cpu", "int4": "cpu", "int8": "cpu", "fp16": "cuda", "bf16": "cuda"}


def _builder() -> Exporter:
    package = "onnxruntime-genai"
    return Exporter(package, "onnxruntime_genai.models.builder", f"install it with `{part(package).pip}`")


def require_genai() -> None:
    """Raise :class:`MissingDependencyError` unless the builder is installed in this environment."""
    require(_builder(), sys.executable)


def export_genai(
    model: Path,
    target: Path,
    precision: str,
    listener: Listener,
    trust_remote_code: bool = False,
    readers: Sequence[Path] = (),
) -> list[Path]:
    """Export the Hugging Face folder ``model`` to ``target/model.onnx``; returns the files written.

    The files are the graph, its data, ``genai_config.json`` and the tokenizer. Inputs, outputs and the KV cache
    are float32 for fp32, int4 and int8, otherwise of the ``precision``. Raises :class:`InputError` for an unknown
    ``precision``, :class:`MissingDependencyError` or :class:`BuildError`.
    """
    if precision not in PROVIDERS:
        raise InputError(
            f"--precision {precision!r} is not supported by --exporter genai; choose {', '.join(PROVIDERS)}."
        )

    def arguments(folder: Path) -> list[str]:
        return [
            *("-i", str(model.resolve())),
            *("-o", str(folder)),
            *("-p", precision),
            *("-e", PROVIDERS[precision]),
            *("-c", str(folder.parent / "cache")),
            *("--extra_options", "hf_token=false", f"hf_remote={str(trust_remote_code).lower()}"),
        ]

    return export_in_child(_builder(), sys.executable, model, target, arguments, listener, readers)
