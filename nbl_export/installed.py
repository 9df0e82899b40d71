"""How this copy of nbl-export was installed, and the pip line that adds an extra to it.

    from                                       the line
    a clone, or an editable install of it      pip install [-e] '/path/to/clone[extra]'
    a wheel, an sdist or a clone, once         pip install '/path/to/it[extra]', while it is there
    a URL or a git repository                  pip install 'nbl-export[extra] @ URL'
    a package index                            pip install 'nbl-export[extra]'

An editable install stays editable: without ``-e`` pip would put a copy in its place, and what is then changed in the
clone would have no effect. In an environment that pipx or uv made there may be no pip, and the line is for theirs:

    pipx                                       pipx runpip nbl-export install …
    uv, uvx                                    uv pip install --python /path/to/its/python …
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from nbl_export.errors import NblError

NAME = "nbl-export"
PROJECT = "pyproject.toml"
_PIPX = "pipx_metadata.json"
PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Origin:
    """Where this copy came from: a ``path`` that is still there, or a ``url``; the index if neither is known."""

    path: Path | None = None
    url: str | None = None
    editable: bool = False

    def __str__(self) -> str:
        if self.path is not None:
            return f"{self.path} (editable)" if self.editable else str(self.path)
        return self.url or "a package index"


def pip_line(*extras: str) -> str:
    """The command that installs ``extras`` beside this copy, quoted for a shell."""
    origin = find_origin()
    named = f"[{','.join(extras)}]" if extras else ""
    if origin.path is not None:
        what = f"{origin.path}{named}"
    else:
        what = f"{NAME}{named} @ {origin.url}" if origin.url else f"{NAME}{named}"
    return f"{pip_command('install')} {'-e ' * origin.editable}{shlex.quote(what)}"


def pip_command(verb: str) -> str:
    """The command that does ``verb`` (install, uninstall -y) in the environment that this runs in."""
    environment = Path(sys.prefix)
    if (environment / _PIPX).is_file():
        return f"pipx runpip {shlex.quote(environment.name)} {verb}"
    if _has_pip() or not _is_of_uv(environment):
        return f"pip {verb}"
    command, *options = verb.split()
    # uv asks nothing, and warns of the option that says so.
    chosen = "".join(f" {option}" for option in options if option != "-y")
    return f"uv pip {command}{chosen} --python {shlex.quote(sys.executable)}"


def _has_pip() -> bool:
    return find_spec("pip") is not None


def _is_of_uv(environment: Path) -> bool:
    try:
        lines = (environment / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return any(line.split("=")[0].strip() == "uv" for line in lines)


def find_origin(package: Path = PACKAGE) -> Origin:
    """The origin of the copy whose package is the folder ``package``."""
    found = find_distribution(package)
    recorded = _recorded(found) if found else Origin()
    clone = package.parent
    if is_clone(clone):
        return Origin(clone, editable=recorded.editable)
    return recorded


def is_clone(folder: Path) -> bool:
    """Whether ``folder`` is a source tree of this project."""
    try:
        from nbl_export.datafile import TomlError, read_table
    except ModuleNotFoundError:  # before Python 3.11 it needs tomli, which may be what is missing
        return False
    try:
        project = read_table(folder / PROJECT).get("project")
    except (OSError, NblError, TomlError, UnicodeDecodeError):
        return False
    return isinstance(project, dict) and project.get("name") == NAME


def find_distribution(package: Path = PACKAGE) -> Distribution | None:
    """What pip recorded of the copy in ``package``; None if it was not installed, or another one was."""
    try:
        found = distribution(NAME)
    except PackageNotFoundError:
        return None
    recorded = _recorded(found)
    places = [Path(str(found.locate_file(package.name)))]
    if recorded.editable and recorded.path is not None:
        places.append(recorded.path / package.name)
    return found if any(place.resolve() == package for place in places) else None


def _recorded(found: Distribution) -> Origin:
    """The origin by ``direct_url.json`` (the Direct URL data structure of PyPA); a path that is gone is none."""
    try:
        direct = json.loads(found.read_text("direct_url.json") or "{}")
        return _direct(direct)
    except (ValueError, TypeError, AttributeError, KeyError):
        return Origin()


def _direct(direct: dict[str, Any]) -> Origin:
    url, inner = direct.get("url"), direct.get("subdirectory")
    if not url:
        return Origin()
    parts = urlsplit(url)
    if parts.scheme == "file":
        path = Path(url2pathname(parts.path))
        path = path / inner if inner and path.is_dir() else path
        editable = bool(direct.get("dir_info", {}).get("editable"))
        there = path.is_file() if "archive_info" in direct else is_clone(path)
        return Origin(path, editable=editable) if there else Origin()
    fragment = f"#subdirectory={inner}" if inner else ""
    if "vcs_info" in direct:
        vcs = direct["vcs_info"]
        revision = vcs.get("requested_revision") or vcs["commit_id"]
        return Origin(url=f"{vcs['vcs']}+{url}@{revision}{fragment}")
    return Origin(url=f"{url}{fragment}")
