"""The command line: commands, and what the terminal draws."""

import signal
import sys
import threading

from nbl_export.errors import MissingDependencyError
from nbl_export.packages import check_system, import_in_words

# Ctrl-C while Python imports ends the process at once, as it does other programs, instead of with a traceback.
_importing = (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _importing:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

try:
    check_system()
    from nbl_export.cli.main import DEFAULT_COMMAND, app, main
except (MissingDependencyError, ImportError) as error:
    said = import_in_words(error) if isinstance(error, ImportError) else error
    if said is None:
        raise
    print(f"error: {said}", file=sys.stderr)
    sys.exit(said.exit_code)

if _importing:
    signal.signal(signal.SIGINT, signal.default_int_handler)

__all__ = ["DEFAULT_COMMAND", "app", "main"]
