"""What tests of the command line share: screens that are watched."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from nbl_export.cli import output

CONSOLES = {"out": "OUT", "err": "ERR"}


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., StringIO]:
    """Called with a stream's name and a width: what is drawn on it from then on, with colours if asked."""

    def watch(stream: str, width: int = 80, colours: bool = False) -> StringIO:
        text = StringIO()
        console = Console(
            file=text, width=width, highlight=False, force_terminal=colours, legacy_windows=False, _environ={}
        )
        monkeypatch.setattr(output, CONSOLES[stream], console)
        return text

    return watch
