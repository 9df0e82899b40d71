"""Parse the command line: which command, what a file says, errors in one sentence.

Exit codes: 0 pass · 1 a gate failed, or no K meets the budget · 2 bad usage or input · 3 a needed package or device is
missing · 4 an export or build failed · 130, 143, 129 interrupted, ended, hung up · 70 an error of nbl-export itself.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cyclopts import App, CycloptsError, MissingArgumentError, Parameter, Token, UnusedCliTokensError

from nbl_export import __version__, ranks
from nbl_export.cli import commands, output
from nbl_export.errors import INTERNAL, INTERRUPTED, Interrupted, NblError, os_error_in_words
from nbl_export.files import printable
from nbl_export.packages import import_in_words
from nbl_export.settings import NAME, TABLES, read_settings
from nbl_export.settings.choices import LIBRARIES
from nbl_export.settings.definition import ALL_HELP, UsageError

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


def from_file(_app: App, _names: tuple[str, ...], arguments: Any) -> None:
    """Fill in what the configuration file says and the command line does not."""
    options = [a for a in arguments if a.name.startswith("--")]
    given = {a.name: list(a.tokens) for a in options if a.tokens}
    for argument in options:  # an option of two stages, as --seed, stands there twice and is read once
        for token in given.get(argument.name, []) if not argument.tokens else []:
            argument.append(token)
    path = Path(given["--config"][-1].value) if "--config" in given else Path(NAME)
    if "--config" not in given and not (path.is_file() and any(a.name == "--config" for a in options)):
        return
    if not {"--config", "--quiet"} & {*given}:
        print(f"· Settings of {path}.", file=sys.stderr)
    values, table = read_settings(path), None
    for argument in arguments:
        if argument.name == "*":
            table = next((t for t, kind in TABLES.items() if issubclass(argument.hint, kind)), table)
        counts = table == "select" and argument.name in _HOW_MANY and _HOW_MANY & {*given}
        if argument.name not in given and not counts:
            for word in values.get((str(table), argument.name.removeprefix("--")), ()):
                argument.append(Token(keyword=argument.name, value=word, source=str(path)))


app = App(
    name="nbl-export",
    help=_HELP,
    help_format="plaintext",
    help_epilogue=f"{ALL_HELP} explains the advanced options, too.",
    help_flags=["--help", "-h", ALL_HELP],
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
    with output.streams() as stdout:
        with output.signals():
            try:
                if sys.argv[1:]:
                    ranks.begin()
                    code = app(words_of(sys.argv[1:]), exit_on_error=False, print_error=False)
                else:  # not an error message, but no success either: nothing was asked for
                    with contextlib.redirect_stdout(sys.stderr):
                        app(["--help"])
                    code = 2
            except (Exception, KeyboardInterrupt) as error:
                # What fails after a signal came, fails of it.
                code = _fail(Interrupted(output.asked[-1]) if output.asked else error)
            finally:
                ranks.end()
        code = code if isinstance(code, int) else 0
        stdout.flush()  # a signal that comes now ends the process at once: its work is done
        if stdout.lost is not None and stdout.lost.errno != errno.EPIPE:
            why = f"The results could not be written to the standard output ({stdout.lost.strerror})"
            print(f"error: {why}: give it a place.", file=sys.stderr)
            code = code or 2
    sys.exit(code)


def _fail(error: BaseException) -> int:
    """Say in one sentence what went wrong; returns the exit code."""
    if isinstance(error, OSError):
        error = os_error_in_words(error, "while working")
    if isinstance(error, ImportError):
        error = import_in_words(error) or error
    code = getattr(error, "exit_code", INTERRUPTED if isinstance(error, KeyboardInterrupt) else INTERNAL)
    if isinstance(error, CycloptsError | UsageError):
        message, code = f"{_sentence(error)}. See nbl-export --help.", 2
    elif isinstance(error, KeyboardInterrupt):
        message = _ONE_OF_SEVERAL if ranks.place().count > 1 else _INTERRUPTED
    elif isinstance(error, NblError):
        message = str(error)
    elif os.environ.get("NBL_EXPORT_DEBUG"):
        raise error
    else:
        what = f"{type(error).__name__}: {error}"
        message = f"Internal error, please report it: {what} (set NBL_EXPORT_DEBUG=1 for the traceback)."
    # Names out of a file may be long, and may hold what a terminal obeys.
    message = re.sub(r"\S{300,}", lambda long: f"{long[0][:100]}…{long[0][-50:]}", printable(message))
    if ranks.speaks():
        sys.stderr.heard = True  # type: ignore[union-attr]
        print(f"error: {message}", file=sys.stderr)
        if "--json" in sys.argv:
            print(json.dumps({"schema": "nbl-export/error/1", "error": message, "exit_code": code}, indent=1))
        output.log(f"error: {message}")
    return int(code)


def _sentence(error: Exception) -> str:
    """What the parser found, without its full stop."""
    name = getattr(getattr(error, "argument", None), "name", "")
    if isinstance(error, MissingArgumentError) and name:
        return f"{name} needs a value" if name.startswith("-") else f"{name} is missing"
    if isinstance(error, UnusedCliTokensError):
        return f"{' '.join(error.unused_tokens or ())} is more than this command takes"
    return re.sub(r"\.? Did you mean (.*)\?$", r"; did you mean \1", str(error).strip().rstrip("."))
