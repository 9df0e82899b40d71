"""What can be chosen, as data: exporters and what each offers, criteria, fits, libraries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nbl_export.errors import InputError

FitInput = Literal["normed", "residual"]
FitName = Literal["lmmse", "weighted", "sequential", "drop"]
Dtype = Literal["auto", "float32", "bfloat16"]
# The ridge of a fit that Cholesky starts with, and where it gives up.
DEFAULT_RIDGE, MAX_RIDGE = 1e-6, 1e-2
# Each criterion, and whether the model is run for it. What measures best (docs/selection.md) comes first.
CRITERIA = {"greedy": True, "kl": True, "linearity": True, "nmse": False, "cca": False, "drop": True}
DECODER_CRITERION, ENCODER_CRITERION = "greedy", "cca"
# What `--k auto` means: the largest K whose perplexity on the selection text stays within a tenth of the original's.
AUTO_PERPLEXITY_RATIO = 1.10
# The kind of synthetic rows that look far back: it is weighed by itself.
FAR_LOOK_UP = "far look-up"
SELF = "self"
QUANTIZED = ("int4", "int8")
LIBRARIES = ("auto", "tensorrt", "rtx")
# Tokens in one prefill and of context that an engine is built for, as far as the model goes.
MAX_SEQ, MAX_CONTEXT = 512, 2048
RETRIEVAL_CONTEXTS = (256, 512, 1024)
PEERS, DEVICES = ("eager", "compile", "dropped", "llama.cpp", "openvino"), ("cpu", "cuda")


@dataclass(frozen=True)
class Choices:
    """An exporter's precisions and forms of the KV cache, the default first.

    ``fused`` are the caches with which its graphs have operators of onnxruntime's own, such as GroupQueryAttention,
    that TensorRT does not take.
    """

    precisions: tuple[str, ...]
    caches: tuple[str, ...]
    fused: frozenset[str] = frozenset()


_ALL = ("fp32", "fp16", "bf16", *QUANTIZED)
EXPORTERS = {
    "torch": Choices(_ALL, ("concat", "shared", "static", "none"), frozenset({"shared"})),
    "genai": Choices(_ALL, ("concat",), frozenset({"concat"})),
    "optimum": Choices(("fp32",), ("concat",)),
}


# The oldest opset that torch's exporter writes, and the one of each form of the cache: `TensorScatter` is of opset 24,
# and attention is fused to GroupQueryAttention from the operator of opset 23.
OLDEST_OPSET = 18
OPSETS = {"concat": 23, "none": 23, "shared": 23, "static": 24}
NEEDS_ITS_OPSET = ("shared", "static")


# Of any exporter.
PRECISIONS = tuple(dict.fromkeys(name for one in EXPORTERS.values() for name in one.precisions))
CACHES = tuple(dict.fromkeys(name for one in EXPORTERS.values() for name in one.caches))


@dataclass(frozen=True)
class Target:
    """What is fastest where a graph will run; each a default, where the exporter that is taken offers it.

    ``experts`` is the form of a mixture's experts, where it does not follow from the cache.
    """

    exporter: str
    precision: str
    cache: str
    experts: str | None = None


# Where no target is named, standard operators with a cache that every runtime and library takes.
ANYWHERE = Target("torch", "fp32", "concat")
TARGETS = {
    "onnxruntime": Target("torch", "fp32", "shared", "moe"),
    "genai": Target("genai", "fp32", "concat"),
    "tensorrt": Target("torch", "fp16", "static", "dense"),
    "optimum": ANYWHERE,
    "web": ANYWHERE,  # onnxruntime-web multiplies float16 on WebGPU alone
}


def check_opset(opset: int, cache: str) -> None:
    """Raise :class:`InputError` unless torch's exporter writes graphs with this ``cache`` in ``opset``."""
    newest = OPSETS[cache]
    oldest = newest if cache in NEEDS_ITS_OPSET else OLDEST_OPSET
    if oldest <= opset <= newest:
        return
    known = f"opset {newest}" if oldest == newest else f"opsets {oldest} to {newest}"
    other = "; concat and none go with older ones" if OLDEST_OPSET <= opset < oldest else ""
    raise InputError(f"--opset is {opset}; graphs with --kv-cache {cache} are of {known}{other}.")


def check_offered(exporter: str, option: str, value: str | None, offered: tuple[str, ...]) -> None:
    """Raise :class:`InputError` unless the exporter offers ``value`` for ``option``, or None is asked for."""
    if value is not None and value not in offered:
        able = [name for name, c in EXPORTERS.items() if value in c.precisions + c.caches]
        other = f"; {value} is for --exporter {' or '.join(able)}" if able else ""
        raise InputError(
            f"{option} {value!r} is not offered by --exporter {exporter}: choose {', '.join(offered)}{other}."
        )
