"""Rewrite a graph where it lies, so that a kill at any moment is harmless.

1. *Begin.* The old length of the data file is recorded; new weights are appended and reach the disk.
2. *Accept.* The new graph lies beside the old one and has passed every check. Its hash and the record are written down.
3. *Commit.* One rename puts the new graph in place of the old one.
4. *Finish.* The configurations and the record are written, and what was recorded in 1 and 2 is deleted.

A kill before 3 leaves the old graph: the next run cuts the data file to its old length and begins anew. A kill after it
leaves the new graph: the next run does 4.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export.blocks import attentions
from nbl_export.errors import InputError
from nbl_export.export.sidecars import copy_sidecars, sidecars_of, updated_configs
from nbl_export.files import member, sha256_of_file
from nbl_export.graph.external_data import check_own
from nbl_export.graph.io import DATA_SUFFIX, append_graph, appended_file, load_graph
from nbl_export.graph.tensors import all_tensors, external_files
from nbl_export.records import from_json, to_json
from nbl_export.rewrite.folder import Folder
from nbl_export.rewrite.replace import replaced_layers
from nbl_export.rewrite.summary import ForeignSummary


@dataclass(frozen=True)
class Journal:
    """The graph ``graph``, with the hash ``before``, is being rewritten.

    ``data`` had the ``length``, None if it is new. ``after`` is the hash of the accepted new graph, and ``record`` what
    is to be recorded of it.
    """

    graph: str
    before: str
    data: str
    length: int | None
    after: str | None = None
    record: ForeignSummary | None = None


@dataclass(frozen=True)
class Writing:
    """Stores the rewritten graph in the place of the graph ``source`` in ``folder``, by steps 1 to 3.

    New weights are appended to ``data``. ``recorded`` makes the record from the result of the check and the hash of the
    new graph.
    """

    folder: Folder
    source: Path
    data: Path
    recorded: Callable[[Any, str], ForeignSummary]

    def __call__(
        self,
        model: ir.Model,
        target: Path,
        check: Callable[[Path], object],
        progress: Callable[[int], object] | None = None,
    ) -> list[Path]:
        before = sha256_of_file(self.source)
        length = self.data.stat().st_size if self.data.exists() else None
        journal = Journal(self.source.name, before, self.data.name, length)

        def accepted(written: Path) -> None:
            result, after = check(written), sha256_of_file(written)
            self._begin(replace(journal, after=after, record=self.recorded(result, after)))

        try:
            self._begin(journal)
            return append_graph(model, target, accepted, progress, self.data)
        except BaseException:
            if sha256_of_file(self.source) == before:
                settle(self.folder)
            raise

    def _begin(self, journal: Journal) -> None:
        self.folder.begin(to_json(journal))


def data_to_append_to(folder: Folder, source: Path, model: ir.Model) -> Path:
    """The data file of the graph ``source`` for its new weights.

    Raises :class:`InputError` if it is another graph's, or if the record would be written there, and
    :class:`~nbl_export.errors.BuildError` for a link, or a file with a second name.
    """
    files = {path.resolve() for path in external_files(model)}
    if taken := files & {path.resolve() for path in (folder.record_path, folder.pending_path)}:
        raise InputError(
            f"{source} has its weights in {min(taken)}, where the rewrite is recorded: rename that file and export "
            "again, or use --output."
        )
    data = appended_file(model, source)
    if data.exists() and not data.is_symlink() and data.resolve() not in files:
        raise InputError(
            f"{data}, where the new weights would go, does not belong to {source.name}: move it away, or use --output."
        )
    check_own(data)
    return data


def settle(folder: Folder) -> None:
    """Finish or undo the rewrite that a killed process has left in ``folder``."""
    raw = folder.pending()
    if not raw:
        return
    if "files" in raw:
        raise InputError(
            f"{folder.root} holds an unfinished rewrite of another graph: repeat that command, or delete the folder."
        )
    what = f"The record of an unfinished rewrite, {folder.pending_path},"
    journal = from_json(Journal, raw, what, "export the model again")
    graph = _beside(folder, journal.graph)
    digest = sha256_of_file(graph) if graph.is_file() else None
    if digest == journal.before:
        _cut(journal, graph, _beside(folder, journal.data))
    elif digest is not None and digest == journal.after and journal.record is not None:
        complete(folder, graph, journal.record)
    # Any other graph has been put there since, and its data file with it.
    folder.forget()


def complete(folder: Folder, graph: Path, record: ForeignSummary) -> None:
    """Step 4, for the rewritten ``graph``, which says itself which layers are linear."""
    model = load_graph(graph)
    linear = attentions(replaced_layers(model))
    copy_sidecars(
        updated_configs(sidecars_of(graph, external_files(model)), linear, record.kv_layers), folder.root
    )
    folder.finish(record)


def _beside(folder: Folder, name: str) -> Path:
    path = member(folder.root, name, f"A file named in {folder.pending_path}")
    if path.parent != folder.root:
        raise InputError(f"{folder.pending_path} names {name!r}, which is not in {folder.root}: delete it.")
    return path


def _cut(journal: Journal, graph: Path, data: Path) -> None:
    """Give ``data`` its old length again, unless ``graph`` needs more of it."""
    if not data.exists():
        return
    external = [t for _, t in all_tensors(load_graph(graph)) if isinstance(t, ir.ExternalTensor)]
    ends = [(t.offset or 0) + t.nbytes for t in external if Path(t.path).resolve() == data.resolve()]
    if journal.length is None:
        fits = not ends and data.name == graph.name + DATA_SUFFIX
    else:
        fits = max(ends, default=journal.length + 1) <= journal.length
    status = data.lstat()
    if not fits or not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise InputError(
            f"{data} is not what an interrupted rewrite of {graph.name} has left, so it is not cut: export the model "
            "again."
        )
    if journal.length is None:
        data.unlink()
    elif status.st_size > journal.length:
        os.truncate(data, journal.length)
