"""Rewrite a graph exported by another tool, by a plan: no model and no output folder of nbl-export is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.errors import InputError, os_error_in_words
from nbl_export.export.sidecars import copy_sidecars, graph_in, sidecars_of, updated_configs
from nbl_export.files import write_json
from nbl_export.graph.io import load_graph
from nbl_export.graph.tensors import external_files
from nbl_export.linearize.plan import load_plan
from nbl_export.progress import Listener
from nbl_export.records import to_json
from nbl_export.rewrite.replace import linearized_layers, rewrite_file, rewrite_summary
from nbl_export.workspace import Workspace, is_workspace

if TYPE_CHECKING:
    from nbl_export.records import to_json
from nbl_export.rewrite.replace import RewriteResult


def rewrite_foreign(
    onnx: Path, plan: Path, out: Path | None, in_place: bool = False, listener: Listener | None = None
) -> RewriteResult:
    """Rewrite the decoder ``onnx``, a file or a folder, by ``plan`` into the folder ``out``, or in place.

    Updated configurations and the tokenizer are copied too; ``nbl/rewrite.json`` records what was done.
    If :class:`InputError` or :class:`BuildError` is raised, nothing was changed.
    """
    source = graph_in(onnx)
    if in_place == (out is not None):
        raise InputError(
            "The target of the rewrite is not clear: give --output OUT for a new folder, or --in-place, not both."
        )
    folder = source.parent if out is None else out
    _check_folder(folder, source, in_place)
    loaded = load_plan(plan)
    model = load_graph(source)
    # Collected before anything is written: in place, the graph's own data files change.
    sidecars = updated_configs(
        sidecars_of(source, external_files(model)), loaded.chosen, loaded.attention_layers
    )
    try:
        if in_place and linearized_layers(model) == loaded.chosen:
            copy_sidecars(
                sidecars, folder
            )  # an earlier run may have stopped between graph and configurations
        result = rewrite_file(source, loaded, folder / source.name, in_place, listener)
        copy_sidecars(sidecars, folder)
        summary = folder / Workspace(folder).rewrite_summary.relative_to(folder)
        write_json(summary, {"source": source.name, **to_json(rewrite_summary(result, loaded))})
    except OSError as error:
        raise os_error_in_words(error, "while rewriting") from error
    return result


def _check_folder(folder: Path, source: Path, in_place: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; --output must be a folder.")
    if not in_place and folder.resolve() == source.parent.resolve():
        raise InputError(
            f"{folder} is the folder of the graph itself: choose another --output, or use --in-place."
        )
    if is_workspace(folder):
        raise InputError(
            f"{folder} is an output folder of nbl-export: choose another --output, or run "
            f"`nbl-export rewrite {folder}`."
        )
