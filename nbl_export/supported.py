"""Whether this system can run nbl-export at all: asked before what another system does not have is imported."""

from __future__ import annotations

import sys

from nbl_export.errors import MissingDependencyError


def check_system(platform: str | None = None) -> None:
    """Raise :class:`MissingDependencyError` on Windows, which has neither POSIX file locks nor its signals.

    ``platform`` is as in ``sys.platform``, which it is by default.
    """
    if (platform or sys.platform) == "win32":
        raise MissingDependencyError(
            "nbl-export runs on Linux, and this is Windows: run it in WSL (wsl --install) or in a Linux container."
        )
