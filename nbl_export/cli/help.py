"""The help, kept to one screen: `run --help` names the options that most never need, `--help-all` explains them."""

from __future__ import annotations

import sys
from typing import Any

from cyclopts.help import DefaultFormatter

from nbl_export.settings.definition import MORE


class ScreenHelp(DefaultFormatter):
    """Panels as the library draws them, but the advanced one of a long help as names alone."""

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        if panel.title != MORE.name or len(panel.entries) < 14 or "--help-all" in sys.argv:
            super().__call__(console, options, panel)
            return
        from rich.panel import Panel
        from rich.text import Text

        names = " ".join(name for entry in panel.entries for name in entry.names)
        title = f"{panel.title}: explained by --help-all"
        console.print(Panel(Text(names, style="cyan"), title=title, title_align="left"))
