"""What can be asked of `convert`: the form of another engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nbl_export.errors import InputError
from nbl_export.settings.definition import GRAPH, Settings, Task, options, setting

# Each precision by the name that llama.cpp has for it.
GGUF_TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_k_m": "Q4_K_M"}
_HALVES = ("fp32", "fp16", "bf16")
# What each form can have. OpenVINO's own writer shortens weights to float16 alone.
PRECISIONS = {
    "gguf": tuple(GGUF_TYPES),
    "mlx": _HALVES,
    "hf": _HALVES,
    "openvino": ("fp32", "fp16"),
    "decilm": _HALVES,
}


@options
@dataclass(frozen=True)
class ConvertSettings(Settings):
    """Which form, and how its weights are stored.

    to: The form: gguf (a file for llama.cpp), mlx (a folder for mlx-lm), hf (a folder for transformers), openvino (a
        folder for openvino-genai), decilm (a folder for TensorRT-LLM, without b).
    precision: fp32, fp16, bf16; gguf: q8_0 (8 bits, a scale for each 32 weights), q4_k_m (by llama.cpp).
    """

    to: Literal["gguf", "mlx", "hf", "openvino", "decilm"] = setting(
        "gguf", GRAPH, metavar="|".join(PRECISIONS)
    )
    precision: Literal["fp32", "fp16", "bf16", "q8_0", "q4_k_m"] = setting("fp16", GRAPH)

    def check(self) -> None:
        super().check()
        if self.precision not in (offered := PRECISIONS[self.to]):
            able = " or ".join(
                form for form, precisions in PRECISIONS.items() if self.precision in precisions
            )
            raise InputError(
                f"--precision {self.precision} is of --to {able}, not of --to {self.to}: choose "
                f"{' or '.join(offered)}, and quantize with the engine's own."
            )

    def resolve(self, task: Task) -> ConvertSettings:
        """Itself; raises :class:`InputError` for an encoder."""
        if not task.causal:
            raise InputError(f"--to {self.to} is for decoders; this model is an encoder ({task.name}).")
        return self
