"""The user-facing errors, each with its exit code (see DESIGN: exit codes).

Everything raised on purpose is an :class:`NblError`. Its message is one sentence: what is wrong, where, and
what to do. The command line prints that sentence and nothing else.
"""

from __future__ import annotations

import errno


class NblError(Exception):
    """Base of all user-facing errors. ``exit_code`` is what the command line returns."""

    exit_code = 2


class InputError(NblError):
    """Bad usage or bad input: a path, an option, a file's content (exit code 2)."""


class CalibrationError(InputError):
    """The activations or the statistics of a layer cannot be used (exit code 2)."""


class MissingDependencyError(NblError):
    """A required package or device is missing (exit code 3)."""

    exit_code = 3


class BuildError(NblError):
    """An export, a graph rewrite or an engine build failed (exit code 4)."""

    exit_code = 4


GATE_FAILED = 1


class BudgetError(NblError):
    """The loss budget or the requested speedup cannot be met (exit code 1, like a failed gate)."""

    exit_code = GATE_FAILED


INTERRUPTED = 130
ENDED = 143
INTERNAL = 70


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end. The exit code is the shell's for it: 128 + ``signum``."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.exit_code = 128 + signum


# What the operating system reports when the disk is full; EFBIG is a file-size limit (ulimit -f).
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS}


def os_error_in_words(error: OSError, doing: str) -> InputError:
    """One sentence for an ``OSError`` that occurred ``doing`` something (``"in stage `export`"``)."""
    where = f" ({error.filename})" if error.filename else ""
    # NumPy reports a short write without an error number.
    short_write = error.errno is None and ("writing" in str(error) or "written" in str(error))
    if error.errno in _NO_ROOM or short_write:
        return InputError(
            f"No room on the disk {doing}{where}: free some space or choose another --output, "
            "then run the same command again; finished stages are kept."
        )
    if error.errno in _NO_ACCESS:
        return InputError(f"No permission {doing}{where}: choose a folder you can write to.")
    return InputError(f"{error.strerror or error} {doing}{where}.")


def interrupt_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The interrupt that a library turned into an ``error`` of its own; None if there was none."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, KeyboardInterrupt):
        seen = seen.__cause__ or seen.__context__
    return seen


def first_line(error: BaseException) -> str:
    """The first line of what a library says, without its full stop; the name of the error if it says nothing."""
    kind = type(error).__name__
    line = (str(error).strip().splitlines() or [kind])[0].rstrip(".")
    return f"{kind}: {line}" if isinstance(error, KeyError) else line  # whose message is the key alone
