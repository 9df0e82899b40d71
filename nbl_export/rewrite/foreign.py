"""Rewrite a graph exported by another tool, by a plan: no model and no output folder of nbl-export is needed.

All files are made and checked in a scratch folder before the first is moved. ``nbl/rewrite.json`` names those that
rewrites have put there, before they are moved; the graph is deleted first and moved last. A kill leaves the graph and
all its files, or no graph, and the same call ends as it would have ended.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from nbl_export.errors import InputError, os_error_in_words
from nbl_export.export.sidecars import copy_sidecars, graph_in, sidecars_of
from nbl_export.files import (
    TEMPORARY,
    locked,
    member,
    overlap,
    read_json,
    sha256_of_file,
    sweep,
    sync,
    write_json,
)
from nbl_export.graph.io import external_files, load_graph
from nbl_export.graph.summary import ForeignSummary
from nbl_export.linearize.plan import load_plan
from nbl_export.progress import Listener, Silent
from nbl_export.records import from_json, to_json
from nbl_export.rewrite.replace import RewriteResult, kept_layers, rewrite_file, rewrite_summary
from nbl_export.workspace import is_workspace


def rewrite_foreign(onnx: Path, plan: Path, out: Path, listener: Listener | None = None) -> RewriteResult:
    """Rewrite the decoder ``onnx``, a file or a folder, by ``plan`` into the folder ``out``.

    Updated configurations and the tokenizer are copied too. If :class:`InputError` or :class:`BuildError` is raised,
    nothing was changed.
    """
    source = graph_in(onnx)
    if not source.is_file():
        raise InputError(f"The ONNX file {source} does not exist.")
    if overlap(out, source.parent):
        raise InputError(f"{out} and the folder of the graph are inside each other: choose another --output.")
    if is_workspace(out):
        raise InputError(
            f"{out} is an output folder of nbl-export: choose another --output, or run `nbl-export rewrite {out}`."
        )
    loaded, model = load_plan(plan), load_graph(source)
    files = sidecars_of(source, external_files(model))
    kept = kept_layers(model, loaded)
    try:
        with _opened(out) as scratch:
            result = rewrite_file(source, loaded, scratch / source.name, listener or Silent())
            sidecars = copy_sidecars(files, scratch, loaded.linear_attention, kept)
            names = [path.name for path in (*result.files, *sidecars)]
            record = ForeignSummary(
                **vars(rewrite_summary(result)),
                source=source.name,
                plan_sha256=sha256_of_file(plan.with_suffix(".json")),
                graph_sha256=sha256_of_file(scratch / source.name),
                files=tuple(names),
            )
            _publish(scratch, out, record)
    except OSError as error:
        raise os_error_in_words(error, "while rewriting") from error
    return replace(result, files=[out / path.name for path in result.files])


@contextmanager
def _opened(out: Path) -> Iterator[Path]:
    """A scratch folder in ``out``, which is made if needed, and locked; what killed processes have left is deleted.

    Raises :class:`InputError` if another process works there, or if ``out`` holds what no earlier rewrite has written.
    """
    new, nbl = not out.exists(), out / "nbl"
    if not new and not out.is_dir():
        raise InputError(f"{out} is a file; --output must be a folder.")
    if nbl.is_symlink():
        raise InputError(f"{nbl} is a link, but must be a folder for the record: delete it.")
    nbl.mkdir(parents=True, exist_ok=True)
    lock = nbl / ".lock"
    try:
        with locked(lock, f"Another nbl-export is writing to {out}: wait for it, then start again."):
            try:
                sweep(out)
                sweep(nbl)
                known = {*(out / name for name in _written(out)), _record_of(out), lock}
                strange = [p for p in sorted(out.rglob("*")) if p not in known and p != nbl]
                if strange:
                    raise InputError(
                        f"{out} has files that no rewrite of nbl-export has written "
                        f"({', '.join(str(p.relative_to(out)) for p in strange[:3])}), so nothing is written there: "
                        "choose another --output."
                    )
                scratch = Path(tempfile.mkdtemp(prefix=".rewrite.", suffix=TEMPORARY, dir=out))
                try:
                    yield scratch
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
            finally:
                lock.unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # in use
            nbl.rmdir()
            if new:
                out.rmdir()


def _record_of(out: Path) -> Path:
    return out / "nbl" / "rewrite.json"


def _written(out: Path) -> list[str]:
    """The files that earlier rewrites into ``out`` have written, or had begun to write."""
    path, remedy = _record_of(out), "delete it, or choose another folder"
    if not path.exists():
        return []
    raw = read_json(path, "The record of the rewrite", remedy)
    record = from_json(ForeignSummary, raw, f"The record of the rewrite, {path},", remedy)
    return [str(member(out, name, f"A file named in {path}").relative_to(out)) for name in record.files]


def _publish(scratch: Path, out: Path, record: ForeignSummary) -> None:
    """Move the finished files of ``scratch`` to ``out``, in place of those of an earlier rewrite."""
    old = _written(out)
    write_json(_record_of(out), to_json(replace(record, files=tuple({*old, *record.files}))))
    for name in sorted(old, key=lambda name: not name.endswith(".onnx")):
        (out / name).unlink(missing_ok=True)
    sync(out)
    for name in sorted(record.files, key=lambda name: name == record.source):
        (scratch / name).replace(out / name)
    sync(out)
    write_json(_record_of(out), to_json(record))
