"""How much worse than another run this one may be: the gates of `nbl-export diff`."""

from __future__ import annotations

from dataclasses import dataclass

from nbl_export.settings.definition import COST, Settings, at_least, options, setting

_FACTOR = at_least(1, "1 or more (1.05 allows 5 % more)")


@options
@dataclass(frozen=True)
class DiffBounds(Settings):
    """What B may cost beside A, each a factor, and None where the user bounds nothing. B may be at the bound exactly.

    max_ppl_increase: Exit 1 where B's perplexity ratio is more than X times A's.
    max_slowdown: Exit 1 where B is surely slower than A by more than X times, by 95 % intervals.
    max_size_increase: Exit 1 where B's graph and weights are more than X times A's bytes.
    """

    max_ppl_increase: float | None = setting(None, COST, _FACTOR)
    max_slowdown: float | None = setting(None, COST, _FACTOR)
    max_size_increase: float | None = setting(None, COST, _FACTOR)
