"""What action.yml runs; needs Python alone.

    python scripts/action.py words VARIABLE COMMAND WORD ...   run a command with the words of a variable at its end
    python scripts/action.py compare VARIABLE BEFORE OUT       nbl-export diff, with the words of a variable at its end
    python scripts/action.py show OUT                          say in the workflow what the report in OUT found

Words are those that a shell reads, and nothing else that a shell does: an input of an action never becomes code. Said
are an annotation for each check that failed, of the comparison and of the report; and both pages are in the job
summary: the file that GITHUB_STEP_SUMMARY names.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

# A job summary of more is not shown.
_MOST = 1 << 20


def words(variable: str, *command: str, stdout: int | None = None) -> subprocess.CompletedProcess[str]:
    try:
        more = shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        print(f"::error title=nbl-export::{variable.lower()}: {error}: quote it as for a shell.")
        sys.exit(2)
    return subprocess.run([*command, *more], stdout=stdout, text=True)


def compare(variable: str, before: str, out: str) -> subprocess.CompletedProcess[str]:
    page = Path(out) / "report" / "diff.md"
    done = words(
        variable, "nbl-export", "diff", before, out, "--json", "--markdown", str(page), stdout=subprocess.PIPE
    )
    print("\n".join(errors_of(json.loads(done.stdout or "{}"))))
    return done


def show(out: str) -> None:
    folder = Path(out) / "report"
    if not (folder / "report.json").is_file():
        print("::error title=nbl-export::There is no report: the step before says why.")
        return
    print("\n".join(errors_of(json.loads((folder / "report.json").read_text(encoding="utf-8")))))
    if place := os.environ.get("GITHUB_STEP_SUMMARY"):
        pages = (folder / name for name in ("diff.md", "report.md"))
        text = "\n\n".join(page.read_text(encoding="utf-8") for page in pages if page.is_file())
        with Path(place).open("ab") as file:
            # A summary cannot show pictures.
            file.write(cut(re.sub(r"^!\[.*\]\(.*\)\n*", "", text, flags=re.M)).encode())


def errors_of(report: Any) -> list[str]:
    """A workflow command for each check of a report or a comparison that failed."""

    def escaped(text: str, more: str = "") -> str:
        """In one line, and without what ends a property."""
        return "".join(f"%{ord(c):02X}" if c in "%\r\n" + more else c for c in text)

    failed = (check for check in report.get("checks", ()) if check["status"] == "failed")
    return [f"::error title=nbl-export: {escaped(c['name'], ':,')}::{escaped(c['detail'])}" for c in failed]


def cut(text: str, most: int = _MOST) -> str:
    """``text``, or whole lines of its beginning, of at most so many bytes of UTF-8; a folded table is closed."""
    if len(text.encode()) <= most:
        return text
    kept = text.encode()[: most - 100].rsplit(b"\n", 1)[0].decode()
    folded = kept.count("<details>") > kept.count("</details>")
    return f"{kept}\n{'</details>' * folded}\n\nCut here: report.md in the artifact has the rest.\n"


if __name__ == "__main__":
    verbs: dict[str, Any] = {"words": words, "compare": compare, "show": show}
    ended = verbs[sys.argv[1]](*sys.argv[2:])
    sys.exit(ended.returncode if ended else 0)
