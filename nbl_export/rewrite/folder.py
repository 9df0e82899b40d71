"""The folder that `rewrite --onnx` writes into: its lock, its leftovers, its record, and what it may overwrite.

``nbl/rewrite.json`` records a finished rewrite, ``nbl/rewrite.pending.json`` one that has begun to change the folder. A
killed process leaves the latter, and the next one goes on from there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError
from nbl_export.files import TEMPORARY, locked, member, overlap, read_json, sweep, sync, write_json
from nbl_export.records import from_json, to_json
from nbl_export.rewrite.summary import ForeignSummary
from nbl_export.workspace import is_workspace

_REMEDY = "delete it, or choose another folder"


@dataclass(frozen=True)
class Folder:
    """A folder whose lock is held."""

    root: Path

    @property
    def record_path(self) -> Path:
        return self.root / "nbl" / "rewrite.json"

    @property
    def pending_path(self) -> Path:
        return self.root / "nbl" / "rewrite.pending.json"

    def record(self) -> ForeignSummary | None:
        """The record of the finished rewrite; None without one, or for one of a release that did not list files.

        Raises :class:`InputError` for a file that is no such record.
        """
        if not self.record_path.exists():
            return None
        raw = read_json(self.record_path, "The record of the rewrite", _REMEDY)
        if isinstance(raw, dict) and {"before", "after"} <= raw.keys() and "plan_sha256" not in raw:
            return None
        return from_json(ForeignSummary, raw, f"The record of the rewrite, {self.record_path},", _REMEDY)

    def pending(self) -> dict[str, Any]:
        """What an unfinished rewrite has left about itself; empty without one."""
        if not self.pending_path.exists():
            return {}
        raw = read_json(self.pending_path, "The record of an unfinished rewrite", _REMEDY)
        if not isinstance(raw, dict) or not raw:
            raise InputError(f"{self.pending_path} is not a record of nbl-export: {_REMEDY}.")
        return raw

    def begin(self, pending: dict[str, Any]) -> None:
        """Record that the folder is about to be changed, and how to go on after a kill."""
        write_json(self.pending_path, pending)

    def finish(self, record: ForeignSummary) -> None:
        """Record that the rewrite is done."""
        write_json(self.record_path, to_json(record))
        self.forget()

    def forget(self) -> None:
        """Nothing is unfinished any more."""
        self.pending_path.unlink(missing_ok=True)
        sync(self.pending_path.parent)

    def written(self) -> list[Path]:
        """The files that earlier rewrites into this folder have written, or had begun to write."""
        record = self.record()
        names = [*(record.files if record else ()), *_names(self.pending().get("files"))]
        return [member(self.root, name, f"A file named in {self.record_path.parent}") for name in names]

    def check_unused(self) -> None:
        """Raise :class:`InputError` if the folder holds anything that no earlier rewrite has written."""
        known = {*self.written(), self.record_path, self.pending_path, _lock(self.root)}
        strange = list(islice((path for path in _files(self.root) if path not in known), 4))
        if strange:
            names = ", ".join(str(path.relative_to(self.root)) for path in strange[:3])
            more = " and more" if len(strange) > 3 else ""
            raise InputError(
                f"{self.root} has files that no rewrite of nbl-export has written ({names}{more}), so nothing is "
                "written there: choose another --output."
            )

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for the new files, on the same file system."""
        scratch = Path(tempfile.mkdtemp(prefix=".rewrite.", suffix=TEMPORARY, dir=self.root))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def publish(self, scratch: Path, record: ForeignSummary) -> None:
        """Move the finished files of ``scratch`` into the folder, in place of those of an earlier rewrite.

        A kill leaves the graph and all its files, or no graph: never the graph of one rewrite with the data of another.
        """
        old = self.written()
        self.begin({"files": sorted({*(path.name for path in old), *record.files})})
        self.record_path.unlink(missing_ok=True)
        for path in old:
            if path.name == record.source or path.suffix == ".onnx" or path.name not in record.files:
                path.unlink(missing_ok=True)
        sync(self.root)
        for name in sorted(record.files, key=lambda name: name == record.source):
            (scratch / name).replace(self.root / name)
        sync(self.root)
        self.finish(record)


@contextmanager
def opened(root: Path) -> Iterator[Folder]:
    """The folder ``root``, made if needed, with its lock held and the leftovers of killed processes deleted.

    Raises :class:`InputError` if another process works there or if it is an output folder of nbl-export.
    """
    new = not root.exists()
    if not new and not root.is_dir():
        raise InputError(f"{root} is a file; --output must be a folder.")
    nbl = root / "nbl"
    if nbl.is_symlink() or (nbl.exists() and not nbl.is_dir()):
        raise InputError(f"{nbl} is a link or a file, but must be a folder for the record: {_REMEDY}.")
    _check_no_workspace(root)  # before its lock is touched
    nbl.mkdir(parents=True, exist_ok=True)
    try:
        with locked(_lock(root), f"Another nbl-export is writing to {root}: wait for it, then start again."):
            try:
                _check_no_workspace(root)
                sweep(root)
                sweep(nbl)
                yield Folder(root)
            finally:
                _lock(root).unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # in use
            nbl.rmdir()
            if new:
                root.rmdir()


def check_apart(out: Path, source: Path) -> None:
    """Raise :class:`InputError` if the folder ``out`` is the folder ``source``, or one is inside the other."""
    shared = overlap(out, source)
    if shared == "is":
        raise InputError(
            f"{out} is the folder of the graph itself: choose another --output, or use --in-place."
        )
    if shared:
        raise InputError(f"{out} and the folder of the graph are inside each other: choose another --output.")


def _check_no_workspace(root: Path) -> None:
    if is_workspace(root):
        raise InputError(
            f"{root} is an output folder of nbl-export: choose another --output, or run `nbl-export rewrite {root}`."
        )


def _lock(root: Path) -> Path:
    return root / "nbl" / ".lock"


def _names(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        yield from (here / name for name in sorted(names))
        # os.walk lists a link to a folder as a folder and does not enter it.
        yield from (here / name for name in sorted(folders) if (here / name).is_symlink())
