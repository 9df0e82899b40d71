"""The help, kept to one screen: `run --help` names the options that most never need, `--help-all` explains them.

What every command takes is one line of names in the help of each, too, and so is what most of them take.
"""

from __future__ import annotations

import sys
from typing import Any

from cyclopts.help import DefaultFormatter

from nbl_export.settings.definition import MORE

# The options of every command.
EVERYWHERE = ("--json", "--quiet", "--log-file")
_NAMED = ("--rehash", *EVERYWHERE)


class ScreenHelp(DefaultFormatter):
    """Panels as the library draws them, but what most commands take, and the advanced one of a long help, as
    names alone.
    """

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        if "--help-all" in sys.argv:
            super().__call__(console, options, panel)
            return
        if panel.title == MORE.name and len(panel.entries) >= 14:
            from rich.panel import Panel
            from rich.text import Text

            names = " ".join(name for entry in panel.entries for name in entry.names)
            title = f"{panel.title}: explained by --help-all"
            console.print(Panel(Text(names, style="cyan"), title=title, title_align="left"))
            return
        super().__call__(console, options, _shortened(panel))


def _shortened(panel: Any) -> Any:
    """``panel`` with one entry for the options that most commands have."""
    from cyclopts.help import HelpEntry

    own = [entry for entry in panel.entries if not set(entry.names) & set(_NAMED)]
    if len(own) == len(panel.entries):
        return panel
    taken = {name for entry in panel.entries for name in entry.names}
    names = tuple(name for name in _NAMED if name in taken)
    return panel.copy(entries=[*own, HelpEntry(positive_names=names, description="Explained by --help-all.")])
