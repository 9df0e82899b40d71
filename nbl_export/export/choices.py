"""What each exporter can be asked for, as data; the exporters themselves are imported where they are used."""

from __future__ import annotations

from dataclasses import dataclass

from nbl_export.errors import InputError


@dataclass(frozen=True)
class Choices:
    """An exporter's precisions and forms of the KV cache, the default first.

    ``fused`` are the caches with which its graphs have operators of onnxruntime's own, such as GroupQueryAttention,
    that TensorRT does not take.
    """

    precisions: tuple[str, ...]
    caches: tuple[str, ...]
    fused: frozenset[str] = frozenset()


EXPORTERS = {
    "torch": Choices(("fp32", "fp16", "bf16"), ("concat", "shared", "static", "none"), frozenset({"shared"})),
    "genai": Choices(("fp32", "fp16", "bf16", "int4", "int8"), ("concat",), frozenset({"concat"})),
    "optimum": Choices(("fp32",), ("concat",)),
}


def choices_of(exporter: str) -> Choices:
    """The choices of ``exporter``; raises :class:`InputError` for an unknown one."""
    if exporter not in EXPORTERS:
        raise InputError(f"--exporter {exporter!r} is unknown; choose {', '.join(EXPORTERS)}.")
    return EXPORTERS[exporter]


def check_choice(exporter: str, option: str, value: str, offered: tuple[str, ...]) -> None:
    """Raise :class:`InputError` unless the exporter offers ``value`` for ``option``."""
    if value not in offered:
        able = [name for name, c in EXPORTERS.items() if value in c.precisions + c.caches]
        other = f"; {value} is for --exporter {' or '.join(able)}" if able else ""
        raise InputError(
            f"{option} {value!r} is not offered by --exporter {exporter}: choose {', '.join(offered)}{other}."
        )
