"""What the operating system says, in words, and the exit codes that the design promises."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from nbl_export import errors
from nbl_export.errors import first_line, os_error_in_words


def os_error(number: int, filename: str | None = "model.onnx.data") -> OSError:
    return OSError(number, os.strerror(number), filename)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_a_full_disk_says_what_to_do_and_that_nothing_is_lost(number: int) -> None:
    error = os_error_in_words(os_error(number), "while writing the graph")
    assert type(error) is errors.InputError
    text = str(error)
    assert text.startswith("No room on the disk while writing the graph (model.onnx.data): ")
    assert "free some space" in text
    assert "--output" in text
    assert "finished stages are kept" in text


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_missing_permission_says_where(number: int) -> None:
    text = str(os_error_in_words(os_error(number), "while writing the graph"))
    assert text.startswith("No permission while writing the graph (model.onnx.data): ")
    assert "a folder you can write to" in text


def test_any_other_error_keeps_the_reason() -> None:
    text = str(os_error_in_words(os_error(errno.ENOTDIR), "while writing the graph"))
    assert text == "Not a directory while writing the graph (model.onnx.data)."
    assert str(os_error_in_words(OSError("it broke"), "while reading")) == "it broke while reading."


def test_a_short_write_of_numpy_is_a_full_disk() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError) as caught:
        np.zeros(1 << 20).tofile(full)
    assert str(os_error_in_words(caught.value, "while writing")).startswith(
        "No room on the disk while writing"
    )


def test_the_first_line_of_what_a_library_says() -> None:
    assert first_line(ValueError("\n One thing.\nAnother.")) == "One thing"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(KeyError(2)) == "KeyError: 2"


def test_an_interrupt_behind_the_error_of_a_library_is_found() -> None:
    def caught(first: BaseException, explicit: bool) -> BaseException:
        try:
            try:
                raise first
            except BaseException as error:
                raise RuntimeError("its own") from error if explicit else ValueError("another")
        except RuntimeError as error:
            return error

    interrupt = errors.Interrupted(15)
    assert errors.interrupt_behind(caught(interrupt, True)) is interrupt
    assert errors.interrupt_behind(caught(ValueError("no"), True)) is None
    assert errors.interrupt_behind(interrupt) is interrupt
