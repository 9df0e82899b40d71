"""A replaced function is itself again afterwards."""

from __future__ import annotations

import math

import pytest

from nbl_export.models.replacing import replaced


def test_a_function_is_itself_again_also_after_an_error() -> None:
    before = math.sqrt
    with pytest.raises(ValueError, match="in between"), replaced(math, "sqrt", lambda _number: 7.0):
        assert math.sqrt(4.0) == 7.0
        raise ValueError("in between")
    assert math.sqrt is before
