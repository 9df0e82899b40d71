"""Read what a model is used for: prefill=512,decode=128@4096,batch=4."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nbl_export.settings.definition import readable

_NUMBER = r"[1-9]\d{0,8}"
_PARTS = {
    "prefill": re.compile(_NUMBER),
    "decode": re.compile(f"{_NUMBER}(@{_NUMBER})?"),
    "batch": re.compile(_NUMBER),
    "weight": re.compile(r"\d{1,9}(\.\d{1,6})?"),
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
    parts = [part.strip().partition("=")[::2] for part in text.split(",")]
    found = dict(parts)
    if len(found) < len(parts) or not all(n in _PARTS and _PARTS[n].fullmatch(v) for n, v in parts):
        raise ValueError(text)
    prefill, batch = (int(found.get(name, least)) for name, least in (("prefill", 0), ("batch", 1)))
    decode, _, context = found.get("decode", "").partition("@")
    after, weight = int(context or prefill) if decode else 0, float(found.get("weight", 1.0))
    if not (prefill or decode) or (decode and not after) or weight <= 0:
        raise ValueError(text)
    return Workload(prefill, int(decode or 0), after, batch, weight)


WORKLOAD = readable(
    workload_of,
    "give a prefill, a decode after a context, or both, as prefill=512,decode=128@4096,batch=4",
)
