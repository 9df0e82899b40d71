"""Where the graph of a package lies, and what else its reader wants: one layout for each kind of reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.export import triton, web


@dataclass(frozen=True)
class Layout:
    """``names`` are the path of the linearized graph, or of the base, in a precision, and the name of its data file.

    ``change`` is done to each graph before it is written, or refuses it; ``finish`` is done to the folder: its graphs,
    their precision, whether they generate. ``genai``: onnxruntime-genai finds the graph beside its configuration.
    ``engine`` is done with the graph and its engine: where the reader wants it, or why that cannot be.
    """

    names: Callable[[str, str], tuple[str, str]]
    change: Callable[[ir.Model], None] = lambda model: None
    finish: Callable[[Path, Sequence[Path], str, bool], None] = lambda *asked: None
    genai: bool = False
    engine: Callable[[Path, Path, Path], str] = lambda *asked: ""


def _folder_names(graph: str, _precision: str) -> tuple[str, str]:
    name = {LINEARIZED: "model", BASE: "base"}[graph]
    return f"{name}.onnx", f"{name}.onnx.data"


def _web_names(graph: str, precision: str) -> tuple[str, str]:
    return web.web_names(precision, {LINEARIZED: web.MODEL, BASE: web.BASE}[graph])


def _finish_web(folder: Path, _graphs: Sequence[Path], precision: str, generates: bool) -> None:
    web.adapt_configs(folder, precision, generates)


def _triton_names(graph: str, _precision: str) -> tuple[str, str]:
    return triton.triton_names(graph)


def _finish_triton(_folder: Path, graphs: Sequence[Path], _precision: str, _generates: bool) -> None:
    triton.write_configs(graphs)


LAYOUTS = {
    "folder": Layout(_folder_names, genai=True),
    "web": Layout(_web_names, web.size_cache, _finish_web),
    "triton": Layout(_triton_names, triton.check_cache, _finish_triton, engine=triton.serve_engine),
}
