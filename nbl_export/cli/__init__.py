"""The command line: commands, and what the terminal draws."""

from nbl_export.cli.main import DEFAULT_COMMAND, app, main

__all__ = ["DEFAULT_COMMAND", "app", "main"]
