"""The command line: commands, and what the terminal draws."""

import signal
import threading

# Ctrl-C while Python imports ends the process at once, as it does other programs, instead of with a traceback.
_importing = (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _importing:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from nbl_export.cli.main import DEFAULT_COMMAND, app, main  # noqa: E402

if _importing:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["DEFAULT_COMMAND", "app", "main"]
