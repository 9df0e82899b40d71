"""The libraries' output is not shown for a block, and is shown again after it."""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import suppress

import pytest

from nbl_export.models.quiet import quiet


def test_libraries_stay_quiet_for_a_block_and_speak_again(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    logger = logging.getLogger("of.a.library")
    for error in (None, ZeroDivisionError):
        with suppress(ZeroDivisionError), quiet():
            assert theirs.get_verbosity() == theirs.ERROR and not theirs.is_progress_bar_enabled()
            assert not logger.isEnabledFor(logging.WARNING) and logger.isEnabledFor(logging.ERROR)
            print("a bar that knows no switch", file=sys.stderr)
            warnings.warn("a warning", stacklevel=1)
            if error:
                raise error
        assert (theirs.get_verbosity(), theirs.is_progress_bar_enabled()) == (level, bars)
        assert logger.isEnabledFor(logging.WARNING)
    assert capsys.readouterr().err == ""
    with pytest.warns(UserWarning, match="a warning"):
        warnings.warn("a warning", stacklevel=1)
