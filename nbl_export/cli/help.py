"""The help, kept to one screen: `run --help` names the options that most never need, `--help-all` explains them.

What nearly every command takes is one line of names in the help of each, too.
"""

from __future__ import annotations

import sys
from typing import Any

from cyclopts.help import DefaultFormatter

from nbl_export.settings.definition import MORE

# The options of every command, and of each that reads a folder's files.
EVERYWHERE = ("--rehash", "--json", "--quiet", "--log-file")


class ScreenHelp(DefaultFormatter):
    """Panels as the library draws them, but what :data:`EVERYWHERE` names, and the advanced one of a long help, as
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
    """``panel`` with one entry for the options of every command."""
    from cyclopts.help import HelpEntry

    own = [entry for entry in panel.entries if not set(entry.names) & set(EVERYWHERE)]
    if len(own) == len(panel.entries):
        return panel
    found = tuple(name for name in EVERYWHERE if any(name in entry.names for entry in panel.entries))
    named = HelpEntry(positive_names=found, description="Explained by --help-all.")
    return panel.copy(entries=[*own, named])
