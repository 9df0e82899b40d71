"""Run a command with the words of a variable at its end: python scripts/with_words.py VARIABLE COMMAND WORD ...

They are words as a shell reads them, and nothing else that a shell does: an input of an action never becomes code.
Needs Python alone.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys


def main() -> int:
    variable, *command = sys.argv[1:]
    try:
        words = shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        print(f"::error title=nbl-export::{variable.lower()}: {error}: quote it as for a shell.")
        return 2
    return subprocess.run([*command, *words]).returncode


if __name__ == "__main__":
    sys.exit(main())
