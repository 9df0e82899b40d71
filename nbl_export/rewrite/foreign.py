"""Rewrite a graph exported by another tool, by a plan: no model and no output folder of nbl-export is needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError, os_error_in_words
from nbl_export.export.sidecars import Sidecar, copy_sidecars, graph_in, sidecars_of, updated_configs
from nbl_export.files import sha256_of_file
from nbl_export.graph.cache import LAYERS_KEY
from nbl_export.graph.io import load_graph
from nbl_export.graph.tensors import external_files
from nbl_export.linearize.plan import Plan, load_plan
from nbl_export.progress import Listener, Silent
from nbl_export.rewrite.folder import Folder, check_apart, opened
from nbl_export.rewrite.in_place import Writing, complete, data_to_append_to, settle
from nbl_export.rewrite.prove import Proof
from nbl_export.rewrite.replace import RewriteResult, kept_layers, rewrite_file, rewrite_summary
from nbl_export.rewrite.summary import ForeignSummary


def rewrite_foreign(
    onnx: Path, plan: Path, out: Path | None, in_place: bool = False, listener: Listener | None = None
) -> RewriteResult:
    """Rewrite the decoder ``onnx``, a file or a folder, by ``plan`` into the folder ``out``, or in place.

    Updated configurations and the tokenizer are copied too; ``nbl/rewrite.json`` records what was done.
    If :class:`InputError` or :class:`BuildError` is raised, nothing was changed. After a kill at any moment, the same
    call ends as it would have ended.
    """
    source = graph_in(onnx)
    if in_place == (out is not None):
        raise InputError(
            "The target of the rewrite is not clear: give --output OUT for a new folder, or --in-place, not both."
        )
    if not source.is_file():
        raise InputError(f"The ONNX file {source} does not exist.")
    if out is not None:
        check_apart(out, source.parent)
    work = _Rewrite(source, load_plan(plan), sha256_of_file(plan.with_suffix(".json")), listener or Silent())
    try:
        with opened(source.parent if out is None else out) as folder:
            return work.in_place(folder) if out is None else work.into(folder)
    except OSError as error:
        raise os_error_in_words(error, "while rewriting") from error


class _Rewrite:
    """One graph, one plan."""

    def __init__(self, source: Path, plan: Plan, plan_sha256: str, listener: Listener) -> None:
        self.source, self.plan, self.listener = source, plan, listener
        self.plan_sha256 = plan_sha256

    def into(self, folder: Folder) -> RewriteResult:
        """Write the rewritten graph and the files beside it into the new or older ``folder``."""
        folder.check_unused()
        sidecars = self._sidecars()
        with folder.scratch() as scratch:
            result = rewrite_file(self.source, self.plan, scratch / self.source.name, self.listener)
            files = [path.name for path in (*result.files, *copy_sidecars(sidecars, scratch))]
            digest = sha256_of_file(scratch / self.source.name)
            folder.publish(scratch, self._record(result, digest, files))
        return replace(result, files=[folder.root / path.name for path in result.files])

    def in_place(self, folder: Folder) -> RewriteResult:
        """Rewrite the graph where it lies, in ``folder``."""
        settle(folder)
        if done := self._done(folder):
            return done
        model = load_graph(self.source)
        if LAYERS_KEY in model.metadata_props:
            raise InputError(
                f"{self.source} is already rewritten, by another plan or an older release: rewrite the original graph."
            )
        self._sidecars()  # whatever they can be refused for, they are refused for now
        data = data_to_append_to(folder, self.source, model)
        writing = Writing(folder, self.source, data, self._record)
        result = rewrite_file(self.source, self.plan, self.source, self.listener, writing)
        complete(folder, self.source, self._record(result, sha256_of_file(self.source)))
        return result

    def _done(self, folder: Folder) -> RewriteResult | None:
        """The recorded result, if this very rewrite is done."""
        record = folder.record()
        if (
            record is None
            or (record.source, record.plan_sha256) != (self.source.name, self.plan_sha256)
            or not self.source.is_file()
            or record.graph_sha256 != sha256_of_file(self.source)
        ):
            return None
        files = [self.source, *external_files(load_graph(self.source))]
        self.listener.note("rewrite: done already, kept.")
        proofs = {p.layer: Proof(p.layer, None, None, p.input_error, p.output_error) for p in record.proofs}
        stored = {s.layer: s.error for s in record.stored}
        return RewriteResult(record.before, record.after, proofs, files, stored, record.kv_layers)

    def _sidecars(self) -> list[Sidecar]:
        """The files for the folder of the rewritten graph; :class:`InputError` if two would have one name."""
        model = load_graph(self.source)
        data = external_files(model)
        files = sidecars_of(self.source, data)
        if taken := {"nbl"} & {self.source.name, *(path.name for path in (*files, *data))}:
            raise InputError(
                f"{self.source.parent / min(taken)} has the name of the folder of our records: rename it first."
            )
        return updated_configs(files, self.plan.linear_attention, kept_layers(model, self.plan))

    def _record(self, result: Any, graph_sha256: str, files: list[str] | None = None) -> ForeignSummary:
        return ForeignSummary(
            **vars(rewrite_summary(result)),
            source=self.source.name,
            plan_sha256=self.plan_sha256,
            graph_sha256=graph_sha256,
            files=tuple(files or ()),
        )
