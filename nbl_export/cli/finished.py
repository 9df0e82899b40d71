"""The commands on what a run has finished, and what every command loads."""

from __future__ import annotations

from typing import Any

from nbl_export.cli.options import (
    After,
    Base,
    Before,
    Config,
    Folder,
    Layout,
    Markdown,
    Out,
    Rehash,
    Said,
    Shown,
    Text,
    TextFile,
    Trust,
)
from nbl_export.errors import GATE_FAILED
from nbl_export.settings import DiffBounds, GenerateSettings, RunSettings
from nbl_export.settings.definition import Settings


def loaded(said: Said, asked: Settings | RunSettings | None = None) -> tuple[Any, Any]:
    """The Python API and what draws, which are imported when a command runs: --help needs neither.

    What is asked for is checked before, so that a value that cannot be is answered at once.
    """
    if asked is not None:
        asked.check()
    from nbl_export import api
    from nbl_export.cli import terminal

    terminal.set_up(said.json, said.quiet, said.log_file)
    return api, terminal


def generate(
    out: Out,
    /,
    *,
    prompt: Text = None,
    prompt_file: TextFile = None,
    settings: GenerateSettings = GenerateSettings(),
    trust: Trust = False,
    rehash: Rehash = False,
    config: Config = None,
    said: Said = Said(),
) -> None:
    """Print what a graph generates after a prompt, or after each line typed."""
    api, terminal = loaded(said, settings)
    from nbl_export.cli import output, writing

    typed = not said.json and writing.is_typed(prompt, prompt_file)
    text = None if typed else writing.prompt_of(prompt, prompt_file)
    listener, written = terminal.TerminalListener(), writing.Written(settings.graph, heard=not said.json)

    def answered(answer: Any) -> None:
        written.end()
        listener.note(writing.figures_line(answer))
        output.log_text(answer.text)

    turns = writing.typed() if text is None else text
    generated = api.generate(out, turns, settings, listener, trust, rehash, written.piece, answered)
    terminal.finish("generate", None, out=out, prompt=text, answers=generated)


def package(
    out: Out,
    /,
    *,
    to: Folder,
    layout: Layout = "folder",
    base: Base = False,
    rehash: Rehash = False,
    said: Said = Said(),
) -> None:
    """Write what a deployment needs, and can verify, to a folder of its own."""
    api, terminal = loaded(said)
    listener = terminal.TerminalListener()
    value = api.package(out, to, listener, rehash, layout, base)
    terminal.show_package(value, to)


def report(out: Out, /, *, said: Said = Said()) -> int:
    """Show the report again and redraw its files from report.json."""
    api, terminal = loaded(said)
    value = api.report(out)
    terminal.show_report(value, out)
    return 0 if value.passed else GATE_FAILED


def inspect(path: Shown, /, *, said: Said = Said()) -> None:
    """Show what a file or an output folder holds, as a table."""
    api, terminal = loaded(said)
    terminal.finish_tables("inspect", api.inspect(path))


def diff(
    a: Before,
    b: After,
    /,
    *,
    bounds: DiffBounds = DiffBounds(),
    markdown: Markdown = None,
    config: Config = None,
    said: Said = Said(),
) -> int:
    """Say what changed from A to B; exit 1 on a regression."""
    api, terminal = loaded(said, bounds)
    to_output = markdown == "-"
    value = api.diff(a, b, bounds, None if to_output else markdown)
    terminal.show_diff(value, to_output)
    return 0 if value.passed else GATE_FAILED
