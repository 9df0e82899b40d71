"""Rewrite a graph exported by another tool, by a plan: no model and no output folder of nbl-export is needed.

All files are made and checked in a scratch folder before anything else changes. Then the graph of an earlier rewrite is
deleted, and its other files; ``nbl/rewrite.json`` names the new ones, which are moved, the graph last. A kill leaves
the graph and all its files, or no graph, and the same call ends as it would have ended.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
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


def rewrite_foreign(onnx: Path, plan: Path, out: Path, listener: Listener | None = None) -> RewriteResult:
    """Rewrite the decoder ``onnx``, a file or a folder, by ``plan`` into the folder ``out``.

    Updated configurations and the tokenizer are copied too. If :class:`InputError` or :class:`BuildError` is raised,
    nothing was changed.
    """
    source = graph_in(onnx)
    loaded, model = load_plan(plan), load_graph(source)
    if overlap(out, source.parent):
        raise InputError(f"{out} and the folder of the graph are inside each other: choose another --output.")
    files = sidecars_of(source, external_files(model))
    kept = kept_layers(model, loaded)
    try:
        with _opened(out) as (scratch, old):
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
            for name in sorted(old, key=lambda name: not name.endswith(".onnx")):
                (out / name).unlink(missing_ok=True)
            sync(out)
            write_json(_record_of(out), to_json(record))
            for name in sorted(names, key=lambda name: name == source.name):
                (scratch / name).replace(out / name)
            sync(out)
    except OSError as error:
        raise os_error_in_words(error, "while rewriting") from error
    return replace(result, files=[out / path.name for path in result.files])


@contextmanager
def _opened(out: Path) -> Iterator[tuple[Path, list[str]]]:
    """A scratch folder in ``out``, which is made if needed, and locked; and what an earlier rewrite has written there.

    What killed processes have left is deleted. Raises :class:`InputError` if another process works there, or if ``out``
    holds what no earlier rewrite has written.
    """
    nbl, lock = out / "nbl", out / "nbl" / ".lock"
    made = [nbl] if out.exists() else [nbl, out]

    def leave() -> None:
        with suppress(OSError):  # in use
            for folder in made:
                folder.rmdir()

    with ExitStack() as stack:
        stack.callback(leave)
        nbl.mkdir(parents=True, exist_ok=True)
        stack.enter_context(
            locked(lock, f"Another nbl-export is writing to {out}: wait for it, then start again.")
        )
        stack.callback(lock.unlink, missing_ok=True)
        sweep(out)
        sweep(nbl)
        old = _written(out)
        known = {nbl, lock, _record_of(out), *(out / name for name in old)}
        if strange := [str(p.relative_to(out)) for p in sorted(out.rglob("*")) if p not in known]:
            raise InputError(
                f"{out} has files that no rewrite of nbl-export has written ({', '.join(strange[:3])}), so nothing is "
                "written there: choose another --output."
            )
        scratch = tempfile.TemporaryDirectory(prefix=".rewrite.", suffix=TEMPORARY, dir=out)
        yield Path(stack.enter_context(scratch)), old


def _record_of(out: Path) -> Path:
    return out / "nbl" / "rewrite.json"


def _written(out: Path) -> list[str]:
    """The files that an earlier rewrite into ``out`` has written, or had begun to write."""
    path, remedy = _record_of(out), "delete it, or choose another folder"
    if not path.exists():
        return []
    raw = read_json(path, "The record of the rewrite", remedy)
    record = from_json(ForeignSummary, raw, f"The record of the rewrite, {path},", remedy)
    return [str(member(out, name, f"A file named in {path}").relative_to(out)) for name in record.files]
