"""The docs site: README and docs/ as they are, and the Python API from its docstrings. `scripts/docs.sh` builds it.

The folder of the sources is the repository, so that a link in a page leads to the same file here and there.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from nbl_export import __version__, api  # noqa: E402
from nbl_export.settings.definition import Settings, settings_of  # noqa: E402

project, release, version = "nbl-export", __version__, __version__
root_doc = "docs/site/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/**"]
# Folders that are not looked into at all.
exclude_patterns = [".*", "out", "build", "dist", "graphs", "tests", "scripts", "nbl_export"]
extensions = ["myst_parser", "sphinx.ext.autodoc"]

nitpicky = True  # a name in a docstring that leads nowhere is an error of a strict build
myst_heading_anchors = 3
highlight_language = "text"
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 100

html_theme = "furo"
html_title = f"nbl-export {release}"
html_extra_path = ["extra"]
html_copy_source = False

# Annotations are read where they are written; these names are imported there for types alone.
VALUES = {
    "Diagnosis": "nbl_export.doctor.diagnosis",
    "EngineFile": "nbl_export.engine.pair",
    "BenchReport": "nbl_export.report.bench",
    "Diff": "nbl_export.report.diff.values",
    "Evaluation": "nbl_export.report.evaluation",
    "RewriteResult": "nbl_export.rewrite.replace",
    "Generated": "nbl_export.generate.answer",
}
vars(api).update({name: getattr(import_module(module), name) for name, module in VALUES.items()})


def tabulate_settings(_app: Any, _kind: str, _name: str, value: Any, _options: Any, lines: list[str]) -> None:
    """The lines `name: help` of a class of settings, with what the command line calls each, and its default."""
    if not (isinstance(value, type) and issubclass(value, Settings)):
        return
    settings = {one.path[-1]: one for one in settings_of(value)}
    helps = [i for i, line in enumerate(lines) if line.split(":")[0] in settings]
    del lines[helps[0] if helps else len(lines) :]
    lines += [
        "",
        ".. list-table::",
        "   :header-rows: 1",
        "",
        "   * - field",
        "     - option",
        "     - meaning",
    ]
    for one in settings.values():
        lines += [f"   * - ``{'.'.join(one.path)}``", f"     - ``--{one.key}``", f"     - {one.help}"]
    lines.append("")


def leave_as_text(_app: Any, _env: Any, node: Any, shown: Any) -> Any:
    """A type in a signature that has no entry here is text. What a docstring names must have one."""
    return None if "refexplicit" in node else shown


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", tabulate_settings)
    app.connect("missing-reference", leave_as_text)
