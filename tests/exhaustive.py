"""What the usual run leaves out for its time: variants that take minutes and seldom say something new.

With ``NBL_EXPORT_ALL_TESTS=1`` all are run.
"""

from __future__ import annotations

import os

import pytest

_ALL = "NBL_EXPORT_ALL_TESTS"
ALL = _ALL in os.environ

exhaustive = pytest.mark.skipif(not ALL, reason=f"only with {_ALL}=1")
