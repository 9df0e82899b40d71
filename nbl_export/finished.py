"""The verbs of :mod:`nbl_export.api` on what a run has finished: nothing is calibrated, selected or rewritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export import pipeline
from nbl_export.progress import Listener, Silent
from nbl_export.ranks import in_one_process
from nbl_export.report.drawing import Table
from nbl_export.report.schema import Report
from nbl_export.settings import ChatSettings, DiffBounds, GenerateSettings, VerifySettings
from nbl_export.stages.inspection import inspect_path
from nbl_export.workspace import Workspace, kept_digests

if TYPE_CHECKING:
    from nbl_export.report.diff.values import Diff
    from nbl_export.stages.chat import Chat
    from nbl_export.stages.package import Package, Verified
    from nbl_export.stages.talking import Generated


@in_one_process
def generate(
    out: str | Path,
    prompt: str,
    settings: GenerateSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
    told: Callable[[str, str], object] = lambda _graph, _piece: None,
) -> tuple[Generated, ...]:
    """What the linearized graph, the unmodified one or both generate after ``prompt``.

    The model that ``out`` was made from is not needed. ``told`` hears the name of the graph and each piece of text as
    it is generated; once it returns False, no more is generated.
    """
    from nbl_export.stages.generate import generate as generate_text

    asked = settings or GenerateSettings()
    asked.check()
    ws = Workspace.open(Path(out), kept_digests(Path(out), rehash, listener))
    return generate_text(ws, prompt, asked, listener or Silent(), told, trust_remote_code)


@in_one_process
@contextmanager
def chat(
    out: str | Path,
    settings: ChatSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Iterator[Chat]:
    """A chat with both graphs, or with one: ``for graph, piece in chat.ask("Hello"): ...``, turn after turn."""
    from nbl_export.stages.chat import chat as chat_with

    asked = settings or ChatSettings()
    asked.check()
    ws = Workspace.open(Path(out), kept_digests(Path(out), rehash, listener))
    with chat_with(ws, asked, listener or Silent(), trust_remote_code) as found:
        yield found


@in_one_process
def package(
    out: str | Path,
    to: str | Path,
    listener: Listener | None = None,
    rehash: bool = False,
    layout: str = "folder",
    base: bool = False,
) -> Package:
    """Write what a deployment needs of ``out`` to the folder ``to``, which :func:`verify_package` takes anywhere.

    ``layout`` is ``web`` for transformers.js and ``triton`` for Triton; with ``base`` it has the unmodified graph as
    well.  The model that ``out`` was made from is not needed.
    """
    from nbl_export.stages.package import package as write_package

    ws = Workspace.open(Path(out), kept_digests(Path(out), rehash, listener))
    with ws.lock():
        return write_package(ws, Path(to), listener or Silent(), layout, base)


@in_one_process
def verify_package(
    package: str | Path,
    model: str | Path,
    settings: VerifySettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
) -> Verified:
    """Whether a package is whole and its graph computes here what PyTorch does with ``model`` and its plan.

    A failed gate is in the value (``passed``), not raised.
    """
    from nbl_export.stages.package import verify_package as verified

    asked = settings or VerifySettings()
    asked.check()
    pipeline.check_machine(asked)
    return verified(Path(package), str(model), asked, listener or Silent(), trust_remote_code)


@in_one_process
def report(out: str | Path) -> Report:
    """Read the report and redraw its Markdown and JUnit files."""
    workspace = Workspace.open(Path(out))
    with workspace.lock():
        return pipeline.report(workspace)


@in_one_process
def inspect(path: str | Path) -> list[Table]:
    """What an ONNX file, an engine, a plan, a moments file or an output folder holds, as tables."""
    return inspect_path(Path(path))


@in_one_process
def diff(
    a: str | Path, b: str | Path, bounds: DiffBounds | None = None, markdown: str | Path | None = None
) -> Diff:
    """What changed from ``a`` to ``b``: output folders, reports, benches, evaluations or graphs.

    A regression is in the value (``passed`` is False), not raised. ``markdown`` is a file to write it to as Markdown.
    """
    from nbl_export.report.diff.compare import compare
    from nbl_export.report.diff.drawing import write_markdown

    asked = bounds or DiffBounds()
    asked.check()
    value = compare(Path(a), Path(b), asked)
    if markdown is not None:
        write_markdown(Path(markdown), value)
    return value
