"""Files on disk: atomic writes, hashes, JSON, and checks that a path stays inside its folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError

# Marks an unfinished file or folder of nbl-export; a leftover may be deleted.
TEMPORARY = ".nbl.tmp"


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, streamed."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write to; it becomes ``path`` only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    # mkstemp creates private files; these are ordinary outputs and follow the umask.
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield temporary
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 ``text`` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """The text of a JSON file; NaN and infinity are refused because JSON cannot represent them."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def jsonable(value: Any) -> Any:
    """``value`` with NaN and infinity, which JSON cannot represent, as ``"nan"``, ``"inf"``, ``"-inf"``."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json_text(value))


def read_json(path: Path, what: str, remedy: str) -> Any:
    """Read a JSON file; an unreadable one is an :class:`InputError` naming ``what`` and the ``remedy``."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{what} is missing ({path}): {remedy}.") from None
    except (OSError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{what} is damaged ({path}: {error}): {remedy}.") from None


def stays_in(folder: Path, target: Path) -> bool:
    """Whether the resolved path ``target`` is inside the resolved ``folder`` or its Hugging Face cache blobs."""
    return any(target.is_relative_to(root) for root in (folder, *_hub_blobs(folder)))


def _hub_blobs(folder: Path) -> list[Path]:
    """The folder to which the Hugging Face cache links the entries of ``folder``.

    models--OWNER--NAME/snapshots/REVISION/… contains links to models--OWNER--NAME/blobs.
    """
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return [parent.parent / "blobs"]
    return []
