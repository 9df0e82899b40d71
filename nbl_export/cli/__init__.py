"""The command line: commands, and what the terminal draws."""

import sys

from nbl_export.errors import INTERRUPTED, MissingDependencyError
from nbl_export.packages import check_system, import_in_words

try:
    check_system()
    from nbl_export.cli.main import DEFAULT_COMMAND, app, main
except KeyboardInterrupt:  # without a traceback, as other programs
    sys.exit(INTERRUPTED)
except (MissingDependencyError, ImportError) as error:
    said = import_in_words(error) if isinstance(error, ImportError) else error
    if said is None:
        raise
    print(f"error: {said}", file=sys.stderr)
    sys.exit(said.exit_code)

__all__ = ["DEFAULT_COMMAND", "app", "main"]
