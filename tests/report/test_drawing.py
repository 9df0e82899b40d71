"""How numbers become text, and which of them are numbers at all."""

from __future__ import annotations

from math import inf, nan

import pytest

from nbl_export.blocks import Mlp, Span
from nbl_export.report.drawing import figure, finite, listed, mebibytes, number, percent


def test_blocks_are_listed() -> None:
    assert listed([]) == "" and listed([4]) == "4"
    assert listed([29, 24, 25, 26, 7, 0, 1]) == "0, 1, 7, 24-26, 29"
    assert listed([Mlp(3), 7, Mlp(1), Mlp(2)]) == "7; MLP 1-3" and listed([Mlp(4)]) == "MLP 4"
    assert listed([Span(8, 9), 3, Span(1, 1), Mlp(6)]) == "3; MLP 6; span 1, 8-9"


def test_finite() -> None:
    assert finite(3) == 3.0 and finite(0) == 0.0
    assert [finite(v) for v in (None, "nan", "inf", float("nan"), float("inf"), True, "1")] == [None] * 7


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (-0.0, "0"),
        (1.25, "1.2e0"),  # a half goes to the even digit
        (1.251e-5, "1.3e-5"),
        (-3.0e-12, "-3.0e-12"),
        (1, "1.0e0"),
        (9.96, "1.0e1"),
        (12345.0, "1.2e4"),
        (nan, "nan"),
        (inf, "inf"),
        (-inf, "-inf"),
        ("nan", "nan"),
    ],
)
def test_figure(value: object, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0%"),
        (1.0, "100%"),
        (0.998, "99.8%"),
        (0.9996, "100%"),
        (0.1005, "10.1%"),
        (nan, "nan"),
        ("inf", "inf"),
    ],
)
def test_percent(value: object, text: str) -> None:
    assert percent(value) == text


def test_what_is_no_number_stays_as_it_is() -> None:
    assert number(1234.5, ",.1f") == "1,234.5" and number(3, ".2f") == "3.00"
    assert [number(v, ".2f") for v in (nan, inf, -inf, "nan", "-inf", None)] == [
        "nan",
        "inf",
        "-inf",
        "nan",
        "-inf",
        "None",
    ]


def test_mebibytes() -> None:
    assert mebibytes(0) == "0.0 MiB" and mebibytes(1 << 20) == "1.0 MiB"
    assert mebibytes(3 * 2**29) == "1,536.0 MiB" and mebibytes(2**20 + 2**18) == "1.2 MiB"
