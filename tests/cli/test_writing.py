"""`generate` as a script has it: the text alone on the standard output, everything else beside it, or one sentence."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbl_export import api
from nbl_export.cli.writing import Written, is_typed, prompt_of, typed
from nbl_export.errors import InputError
from tests.command_line import ENVIRONMENT, nbl

PROMPT = "Once upon a time"
SMALL = ["--max-tokens", 20]


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal, self.lost = terminal, None

    def isatty(self) -> bool:
        return self.terminal


class Stdin:
    def __init__(self, content: bytes, terminal: bool = False) -> None:
        self.buffer, self.terminal = io.BytesIO(content), terminal

    def isatty(self) -> bool:
        return self.terminal


def test_words_a_file_and_the_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("\ufeffHé\r\n\n".encode())
    assert prompt_of(" a\n", None) == " a\n"
    assert prompt_of(None, file) == "Hé\r\n"  # without the end of the last line
    for path in (None, Path("-")):
        monkeypatch.setattr(sys, "stdin", Stdin("模型\r\n".encode()))
        assert prompt_of(None, path) == "模型"


@pytest.mark.parametrize(
    ("words", "content", "message"),
    [
        ("a", b"b", "--prompt and --prompt-file are two prompts"),
        (" \n", None, "--prompt has no text"),
        ("\ud800", None, "--prompt is not UTF-8"),
        (None, b"\xff", "is not UTF-8: convert it"),
        (None, b"\n", "has no text: give a prompt"),
    ],
)
def test_what_is_no_prompt(
    words: str | None, content: bytes | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = None
    if content is not None:
        file = tmp_path / "prompt.txt"
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        prompt_of(words, file)
    if words is None and content is not None:
        monkeypatch.setattr(sys, "stdin", Stdin(content))
        with pytest.raises(InputError, match=message):
            prompt_of(None, None)


def test_a_file_that_is_not_there_and_nobody_who_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="there is no such file"):
        prompt_of(None, tmp_path / "x")
    with pytest.raises(InputError):
        prompt_of(None, tmp_path)
    monkeypatch.setattr(sys, "stdin", Stdin(b"", terminal=True))
    with pytest.raises(InputError, match="There is no prompt: give --prompt TEXT, --prompt-file FILE"):
        prompt_of(None, None)


PIECES = [("base", "a\x1b[2J\tb"), ("base", "\nc"), ("linearized", "d\n"), ("linearized", "e")]


@pytest.mark.parametrize(
    ("graph", "terminal", "expected"),
    [
        ("base", False, "a\x1b[2J\tb\nc"),
        ("base", True, "a�[2J    b\nc\n"),
        ("both", False, "base:\na\x1b[2J\tb\nc\n\nlinearized:\nd\ne\n"),
        ("both", True, "base:\na�[2J    b\nc\n\nlinearized:\nd\ne\n"),
    ],
)
def test_a_pipe_has_the_text_and_a_terminal_what_it_can_show(
    graph: str, terminal: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stdout", stream)
    written = Written(graph)
    for piece in PIECES[: 4 if graph == "both" else 2]:
        assert written.piece(*piece)
    written.end()
    assert stream.getvalue() == expected


def test_what_is_typed_are_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin(b"", terminal=True))
    assert is_typed(None, None) and not is_typed("a", None) and not is_typed(None, Path("-"))
    lines = iter(["Hi", "  ", "b\udcff"])

    def typed_line(_: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", typed_line)
    assert list(typed()) == ["Hi", "b?"]


def test_the_command_prints_the_text_and_nothing_else(talking_out: Path, tmp_path: Path) -> None:
    (expected,) = api.generate(talking_out, PROMPT, api.GenerateSettings(max_tokens=20))
    (tmp_path / "prompt.txt").write_text(PROMPT + "\n")
    done = nbl("generate", talking_out, "--prompt-file", tmp_path / "prompt.txt", *SMALL)
    assert (done.code, done.out) == (0, expected.text)
    assert re.fullmatch(
        r"· linearized: prefill 5 tokens [\d,]+/s · decode 19 tokens [\d,]+/s · cut at --max-tokens\n",
        re.sub(r" *\n(?!$)", " ", done.err),
    ), done.err


def test_a_pipe_that_is_closed_early_is_no_error(talking_out: Path) -> None:
    words = [sys.executable, "-m", "nbl_export", "generate", str(talking_out), "--prompt", PROMPT]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(60) == 0 and "Traceback" not in said and "error" not in said
