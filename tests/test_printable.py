"""What a terminal obeys does not reach it."""

from __future__ import annotations

import pytest

from nbl_export.printable import printable, printable_lines


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("model.layers.0/näme 模型", "model.layers.0/näme 模型"),
        ("a\x1b[2Jb", "a�[2Jb"),
        ("a\r\nb\tc", "a��b�c"),
        ("a\x9b31mb\x7f", "a�31mb�"),
        ("right-to-left \u202e", "right-to-left �"),
        ("half \ud800", "half �"),
    ],
)
def test_a_text_is_shown_on_one_line_without_control_characters(raw: str, shown: str) -> None:
    assert printable(raw) == shown
    printable(raw).encode("utf-8")


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("two\nlines\n", "two\nlines\n"),
        ("\tif x:\r\n", "    if x: \n"),
        ("10\u00a0km", "10 km"),
        ("a\x1b]0;title\x07b\x85c\u2028d\x0be", "a�]0;title�b c d e"),
        ("\u202eabc \ud800", "�abc �"),
    ],
)
def test_lines_stay_and_no_character_is_obeyed(raw: str, shown: str) -> None:
    assert printable_lines(raw) == shown
