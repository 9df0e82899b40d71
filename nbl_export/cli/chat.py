"""The chat in a terminal: what is typed, commands, and the answers of one or two graphs as they come.

A wide terminal has both answers side by side, a narrow one has one after the other. Ctrl-C ends an answer, Ctrl-D the
chat.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table
from rich.text import Text

from nbl_export.cli import output, process, terminal
from nbl_export.cli.writing import cut, figures_of
from nbl_export.errors import InputError
from nbl_export.printable import printable_lines

if TYPE_CHECKING:
    from nbl_export.stages.chat import Chat

_WIDE = 100  # columns from which on two answers stand side by side
_PROMPT = "> "
_HELP = (
    "/reset begins anew, /system TEXT gives a system message, /quit or Ctrl-D ends; Ctrl-C ends an answer."
)
_STYLE = {"base": "bold cyan", "linearized": "bold green"}


def check_terminal() -> None:
    """Raise :class:`InputError` unless somebody types and looks."""
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()):
        raise InputError(
            "`nbl-export chat` needs a terminal to read and write in: in a script, use `nbl-export generate OUT`."
        )


def talk(chat: Chat, out: Path) -> None:
    """Read and answer until the end."""
    with suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited, and those before come back)
    _introduce(chat, out)
    while (line := _typed()) is not None:
        word, _, rest = line.strip().partition(" ")
        try:
            if word in ("/quit", "/exit"):
                return
            if word == "/reset":
                chat.reset()
                terminal.say("Begun anew.")
            elif word == "/system":
                chat.reset(rest.strip())
                terminal.say(
                    "Begun anew, with this system message."
                    if rest.strip()
                    else "Begun anew, without a system message."
                )
            elif word.startswith("/"):
                terminal.say(f"{word} is no command: {_HELP}")
            elif word:
                _answer(chat, line)
        except InputError as error:
            terminal.say(str(error))
        except KeyboardInterrupt:  # a second one, while nothing comes
            process.go_on()
            continue


def _introduce(chat: Chat, out: Path) -> None:
    how = ", ".join(f"{name} in {runtime}" for name, runtime in chat.runtimes.items())
    terminal.say(f"{out}: {how}.")
    if not chat.has_template:
        terminal.say("What you type is continued as plain text: there is no chat template.")
    terminal.say(_HELP)


def _typed() -> str | None:
    """A line; None at the end. Ctrl-C begins another one."""
    while True:
        try:
            print()
            line = input(_PROMPT)
        except KeyboardInterrupt:
            process.go_on()
            continue
        except EOFError:
            print()
            return None
        return line.encode("utf-8", "replace").decode("utf-8")  # bytes that are no text


def _answer(chat: Chat, text: str) -> None:
    side_by_side = len(chat.graphs) > 1 and output.OUT.width >= _WIDE
    with _interruptible() as stopped, closing(chat.ask(text, together=side_by_side)) as pieces:
        for name, own in groupby(pieces, lambda piece: "" if side_by_side else piece[0]):
            texts = _followed(chat, (name,) if name else chat.graphs, own, stopped)
            if stopped.is_set():
                pieces.close()
            output.result(_columns(chat, texts))
            if stopped.is_set():
                return


def _followed(
    chat: Chat, names: Sequence[str], pieces: Iterable[tuple[str, str]], stopped: threading.Event
) -> dict[str, str]:
    """The answers of the graphs ``names``, drawn side by side while they grow."""
    console, texts = output.OUT, dict.fromkeys(names, "")

    def growing() -> Table:
        return _columns(chat, texts, max(1, console.height - 4))

    with Live(console=console, transient=True, refresh_per_second=12, get_renderable=growing):
        for name, piece in pieces:
            texts[name] += printable_lines(piece)
            if stopped.is_set():
                break
    return texts


def _columns(chat: Chat, texts: Mapping[str, str], lines: int | None = None) -> Table:
    """Texts under the names of their graphs, with what they took; of long ones the last ``lines``."""
    console = output.OUT
    table = Table.grid(expand=True, padding=(0, 2, 0, 0))
    for _ in texts:
        table.add_column(ratio=1)
    if len(chat.graphs) > 1:
        table.add_row(*(Text(name, style=_STYLE.get(name, "bold")) for name in texts))
    wrapped = (
        Text(text.strip("\n")).wrap(console, console.width // len(texts) - 2) for text in texts.values()
    )
    table.add_row(*(Text("\n").join(cell[-lines:] if lines else cell) for cell in wrapped))
    answers = [answer for answer in chat.answers if answer.graph in texts]
    table.add_row(*(Text(figures_of(answer), style="dim") for answer in answers))
    if any(map(cut, answers)):
        table.add_row(*(Text(cut(answer), style="dim") for answer in answers))
    return table


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C within the block sets the event; the second one is raised."""
    stopped = threading.Event()

    def stop(signum: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            signal.default_int_handler(signum, frame)
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
