"""The command line: which command, what a file says, errors in one sentence.

Exit codes: 0 pass · 1 a gate failed, or no K meets the budget · 2 bad usage or input · 3 a needed package or device is
missing · 4 an export or build failed · 130, 143, 129 interrupted, ended, hung up · 70 an error of nbl-export itself.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, Token, UnusedCliTokensError
from cyclopts.help import DefaultFormatter, HelpEntry

from nbl_export import __version__, ranks
from nbl_export.cli import commands, process
from nbl_export.errors import INTERNAL, INTERRUPTED, NblError, os_error_in_words
from nbl_export.files import printable
from nbl_export.packages import import_in_words
from nbl_export.settings.choices import LIBRARIES
from nbl_export.settings.definition import FILE, MORE, UsageError
from nbl_export.settings.file import NAME, TABLES, read_settings

DEFAULT_COMMAND = "run"
_INTERRUPTED = "Interrupted; run the same command again to go on from what is done."
_ONE_OF_SEVERAL = f"Ended, or another of the processes was: {ranks.AGAIN}."
_LIKE = 0.75  # how similar a word is to a command for which it may stand: "selct", but not "t5-small"
_HELP = """Replace a transformer's most linear attention layers by one affine map each (Neural Block Linearization), \
in the ONNX graph, and prove the result.

nbl-export MODEL --k 8 -o OUT does everything. The other commands do one stage each on the same OUT and go on from \
what is there. Each has a --help of its own."""
# The command line says how many layers in one of these ways; what a file says of the others is then left out.
_HOW_MANY = {
    "--k",
    "--layers",
    "--max-kl",
    "--max-kv-bytes",
    "--max-ppl-ratio",
    "--max-weight-bytes",
    "--min-speedup",
}


# The options of every command.
EVERYWHERE = ("--json", "--quiet", "--log-file")
_EVERYWHERE_NAMED = ("--rehash", *EVERYWHERE)


class ScreenHelp(DefaultFormatter):
    """Panels as the library draws them, but what most commands take, and the advanced one of a long help, as
    names alone.
    """

    def __call__(self, console: Any, options: Any, panel: Any) -> None:
        if "--help-all" in sys.argv:
            super().__call__(console, options, panel)
            return
        if panel.title == MORE.name and len(panel.entries) >= 14:
            from rich.panel import Panel
            from rich.text import Text

            names = " ".join(name for entry in panel.entries for name in entry.names)
            title = f"{panel.title}: explained by --help-all"
            console.print(Panel(Text(names, style="cyan"), title=title, title_align="left"))
            return
        super().__call__(console, options, _shortened(panel))


def _shortened(panel: Any) -> Any:
    """``panel`` with one entry for the options that most commands have."""
    own = [entry for entry in panel.entries if not set(entry.names) & set(_EVERYWHERE_NAMED)]
    if len(own) == len(panel.entries):
        return panel
    taken = {name for entry in panel.entries for name in entry.names}
    names = tuple(name for name in _EVERYWHERE_NAMED if name in taken)
    return panel.copy(entries=[*own, HelpEntry(positive_names=names, description="Explained by --help-all.")])


def from_file(_app: App, names: tuple[str, ...], arguments: Any) -> None:
    """Fill in what the configuration file says and the command line does not."""
    options = [a for a in arguments if a.name.startswith("--")]
    given = {a.name: list(a.tokens) for a in options if a.tokens}
    for argument in options:  # an option of two stages, as --seed, stands there twice and is read once
        for token in given.get(argument.name, []) if not argument.tokens else []:
            argument.append(token)
    config = next((a for a in options if a.name == "--config"), None)
    path = Path(given["--config"][-1].value) if "--config" in given else Path(NAME)
    if config is None or ("--config" not in given and not path.is_file()):
        return
    if "--config" not in given:
        print(f"· Settings of {path}.", file=sys.stderr)
    values, place = read_settings(path), None
    for argument in arguments:
        if argument.name == "*":
            place = next((t for t, kind in TABLES.items() if issubclass(argument.hint, kind)), place)
        key = (place, argument.name.removeprefix("--"))
        if (
            key in values
            and argument.name not in given
            and not (place == "select" and argument.name in _HOW_MANY and _HOW_MANY & set(given))
        ):
            value = values[key]
            flag = {"implicit_value": value} if isinstance(value, bool) else {"value": json.dumps(value)}
            argument.append(Token(keyword=argument.name, source=FILE, **flag))


app = App(
    name="nbl-export",
    help=_HELP,
    help_format="plaintext",
    help_formatter=ScreenHelp(),
    help_flags=["--help", "-h", "--help-all"],
    version=f"nbl-export {__version__}",
    default_parameter=Parameter(show_choices=False),
    config=from_file,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
COMMANDS = {function.__name__.rstrip("_").replace("_", "-"): function for function in commands.IN_ORDER}
for number, (name, function) in enumerate(COMMANDS.items()):
    app.command(function, name=name, sort_key=number)
app.register_install_completion_command("--install-completion", help="Install completion for this shell.")
app.command(
    lambda: print(app.generate_completion()), name="--show-completion", help="Show completion for this shell."
)


def words_of(arguments: Sequence[str]) -> list[str]:
    """What is no command is a model, as `run` has one; `--trt` alone means `--trt auto`.

    Raises :class:`UsageError` for an empty word, which would be read as this folder, and for a misspelled command.
    """
    words, commands = list(arguments), app.resolved_commands()
    if "" in words:
        before = words[words.index("") - 1] if words[0] else ""
        raise UsageError(f"{before if before.startswith('-') else 'An argument'} is empty")
    if words and words[0] not in commands:
        meant = difflib.get_close_matches(words[0].lower(), commands, n=1, cutoff=_LIKE)
        if meant and "/" not in words[0] and not Path(words[0]).exists():
            raise UsageError(f"{words[0]} is no command, and no model here; did you mean {meant[0]}")
        words.insert(0, DEFAULT_COMMAND)
    following = [*words, ""][1:]
    return [
        new
        for word, after in zip(words, following, strict=True)
        for new in ([word, "auto"] if word == "--trt" and after not in LIBRARIES else [word])
    ]


def main() -> None:
    """Entry point: errors become one sentence on stderr and an exit code; never a traceback."""
    try:
        code = process.run(_command)
    finally:
        ranks.end()
    sys.exit(code)


def _command() -> int:
    """Do what the command line asks; returns the exit code."""
    if not sys.argv[1:]:  # not an error message, but no success either: nothing was asked for
        with contextlib.redirect_stdout(sys.stderr):
            app(["--help"])
        return 2
    try:
        ranks.begin()
        with process.as_interrupts():
            code = app(words_of(sys.argv[1:]), exit_on_error=False, print_error=False)
    except (CycloptsError, UsageError) as error:
        return _said(f"{_sentence(error)}. See nbl-export --help.", 2)
    except NblError as error:
        return _said(str(error), error.exit_code)
    except KeyboardInterrupt as error:
        code = getattr(error, "exit_code", INTERRUPTED)
        return _said(_ONE_OF_SEVERAL if ranks.are_several() else _INTERRUPTED, code)
    except OSError as error:
        translated = os_error_in_words(error, "while working")
        return _said(str(translated), translated.exit_code)
    except Exception as error:
        if isinstance(error, ImportError) and (said := import_in_words(error)):
            return _said(str(said), said.exit_code)
        if os.environ.get("NBL_EXPORT_DEBUG"):
            raise
        what = f"{type(error).__name__}: {error}"
        return _said(
            f"Internal error, please report it: {what} (set NBL_EXPORT_DEBUG=1 for the traceback).", INTERNAL
        )
    return code if isinstance(code, int) else 0


def _sentence(error: Exception) -> str:
    """What the parser found, without its full stop."""
    name = getattr(getattr(error, "argument", None), "name", "")
    if isinstance(error, MissingArgumentError) and name:
        return f"{name} needs a value" if name.startswith("-") else f"{name} is missing"
    if isinstance(error, UnusedCliTokensError):
        return f"{' '.join(error.unused_tokens or ())} is more than this command takes"
    return re.sub(r"\.? Did you mean (.*)\?$", r"; did you mean \1", str(error).strip().rstrip("."))


def _said(message: str, code: int) -> int:
    # Names out of a file may be long, and may hold what a terminal obeys.
    message = re.sub(r"\S{300,}", lambda long: f"{long[0][:100]}…{long[0][-50:]}", printable(message))
    if ranks.speaks():
        process.aloud()
        print(f"error: {message}", file=sys.stderr)
        if "--json" in sys.argv:
            print(json.dumps({"schema": "nbl-export/error/1", "error": message, "exit_code": code}, indent=1))
        # What draws, and the log file with it, is there only once a command has begun.
        if output := sys.modules.get("nbl_export.cli.output"):
            output.log(f"error: {message}")
    return code
