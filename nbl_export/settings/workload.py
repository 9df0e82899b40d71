"""What a model is used for: prefill=512,decode=128@4096,batch=4."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nbl_export.settings.definition import Must

_NUMBER = r"[1-9]\d{0,8}"
_PARTS = {
    "prefill": re.compile(f"({_NUMBER})"),
    "decode": re.compile(f"({_NUMBER})(?:@({_NUMBER}))?"),
    "batch": re.compile(f"({_NUMBER})"),
    "weight": re.compile(r"(\d{1,9}(?:\.\d{1,6})?)"),
}


@dataclass(frozen=True)
class Workload:
    """``batch`` rows, each a prefill of ``prefill`` tokens, then ``decode`` tokens, one by one, after ``context`` ones.

    Either may be 0. ``weight`` says how often it comes among several.
    """

    prefill: int = 0
    decode: int = 0
    context: int = 0
    batch: int = 1
    weight: float = 1.0

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.prefill, self.context + self.decode)

    @property
    def middle(self) -> int:
        """Tokens before the token in the middle of a decode, which takes the mean time while the context grows."""
        return self.context + self.decode // 2


def workload_of(text: str) -> Workload:
    """The workload that is written ``text``; raises ``ValueError`` for anything else.

    A decode without a context comes after the prefill.
    """
    found: dict[str, re.Match[str]] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        match = _PARTS[name].fullmatch(value) if name in _PARTS and name not in found else None
        if match is None:
            raise ValueError(text)
        found[name] = match
    prefill, batch = (
        int(found[name][1]) if name in found else least for name, least in (("prefill", 0), ("batch", 1))
    )
    decode = context = 0
    if "decode" in found:
        decode = int(found["decode"][1])
        context = int(found["decode"][2] or prefill)
    weight = float(found["weight"][1]) if "weight" in found else 1.0
    if not (prefill or decode) or (decode and not context) or weight <= 0:
        raise ValueError(text)
    return Workload(prefill, decode, context, batch, weight)


def _is_workload(text: str) -> bool:
    try:
        workload_of(text)
    except ValueError:
        return False
    return True


WORKLOAD = Must(
    _is_workload,
    "is {value!r}; give a prefill, a decode after a context, or both, as prefill=512,decode=128@4096,batch=4",
)
