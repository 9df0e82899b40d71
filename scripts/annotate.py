"""Say in a GitHub workflow what a report found: python scripts/annotate.py OUT

An annotation for each check that failed, and the report, with what `nbl-export diff` wrote beside it, in the job
summary: the file that GITHUB_STEP_SUMMARY names. Needs Python alone.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

# A job summary of more is not shown.
_MOST = 1 << 20


def errors_of(report: dict[str, object]) -> list[str]:
    """A workflow command for each check of a report that failed."""
    checks = report.get("checks")
    failed = [c for c in checks if c["status"] == "failed"] if isinstance(checks, list) else []
    return [
        f"::error title=nbl-export: {_escaped(c['name'], of_property=True)}::{_escaped(c['detail'])}"
        for c in failed
    ]


def _escaped(text: str, of_property: bool = False) -> str:
    """``text`` as a workflow command takes it: in one line, and without what ends a property."""
    found = str(text).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return found.replace(":", "%3A").replace(",", "%2C") if of_property else found


def summary(folder: Path) -> str:
    """What changed, then the report; pictures are left out, which a summary cannot show."""
    parts = [
        path.read_text(encoding="utf-8")
        for name in ("diff.md", "report.md")
        if (path := folder / name).is_file()
    ]
    return re.sub(r"^!\[.*\]\(.*\)\n*", "", "\n\n".join(parts), flags=re.M)


def cut(text: str, most: int = _MOST) -> str:
    """``text``, or whole lines of its beginning, of at most so many bytes of UTF-8; a folded table is closed."""
    if len(text.encode()) <= most:
        return text
    kept = text.encode()[: most - 100].rsplit(b"\n", 1)[0].decode()
    folded = kept.count("<details>") > kept.count("</details>")
    return f"{kept}\n{'</details>' * folded}\n\nCut here: report.md in the artifact has the rest.\n"


def main() -> None:
    folder = Path(sys.argv[1]) / "report"
    if not (folder / "report.json").is_file():
        print("::error title=nbl-export::There is no report: the step before says why.")
        return
    print("\n".join(errors_of(json.loads((folder / "report.json").read_text(encoding="utf-8")))))
    if place := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(place).open("ab") as file:
            file.write(cut(summary(folder)).encode())


if __name__ == "__main__":
    main()
