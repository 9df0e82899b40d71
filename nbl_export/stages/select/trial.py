"""Graphs with linear layers to time while layers are chosen; they are gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.blocks import Block
from nbl_export.files import TEMPORARY
from nbl_export.progress import Listener

if TYPE_CHECKING:
    from nbl_export.linearize.plan import Plan, Replacement
    from nbl_export.workspace import Workspace


@contextmanager
def trial_graph(
    ws: Workspace, plan: Plan, layers: Mapping[Block, Replacement], name: str, listener: Listener
) -> Iterator[Path]:
    """The exported graph with these ``layers`` replaced; all other weights it reads from where the unmodified one has
    them. ``name`` tells it from others that are there at the same time; ``plan`` is one without layers."""
    from nbl_export.graph.io import save_beside
    from nbl_export.linearize.plan import ranks_of
    from nbl_export.rewrite.replace import rewrite_file

    graph, data = (ws.root / f"{name}.{what}{TEMPORARY}" for what in ("onnx", "data"))
    try:
        write = partial(save_beside, data=data.name)
        trial = plan.with_replaced(layers)
        trial = replace(trial, ranks=ranks_of(trial.layers))
        rewrite_file(ws.baseline, trial, graph, listener, write)
        yield graph
    finally:
        graph.unlink(missing_ok=True)
        data.unlink(missing_ok=True)


def why_not_timed(ws: Workspace, graphs: int = 2) -> str | None:
    """Why graphs cannot be timed, ``graphs`` of them in turn; None if they can."""
    from nbl_export.graph.half_emulation import UNTIMED, needs_emulation
    from nbl_export.graph.io import load_graph
    from nbl_export.verify.speed.pair import anew_or_why_not

    exported = ws.current("export")
    if exported is None or exported.dropped:
        return f"the model is not exported yet (nbl-export export {ws.root})"
    if needs_emulation(load_graph(ws.baseline)):
        return UNTIMED
    why = anew_or_why_not(*[ws.baseline] * graphs)
    return why if isinstance(why, str) else None
