"""How numbers become text, and which of them are numbers at all."""

from __future__ import annotations

from nbl_export.blocks import Mlp, Span
from nbl_export.report.drawing import listed


def test_blocks_are_listed() -> None:
    assert listed([]) == "" and listed([4]) == "4"
    assert listed([29, 24, 25, 26, 7, 0, 1]) == "0, 1, 7, 24-26, 29"
    assert listed([Mlp(3), 7, Mlp(1), Mlp(2)]) == "7; MLP 1-3" and listed([Mlp(4)]) == "MLP 4"
    assert listed([Span(8, 9), 3, Span(1, 1), Mlp(6)]) == "3; MLP 6; span 1, 8-9"
