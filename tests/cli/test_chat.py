"""The chat as a person has it: typed lines, answers side by side or in turn, Ctrl-C and Ctrl-D."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nbl_export import api
from nbl_export.cli import chat as screen
from nbl_export.cli import output
from nbl_export.stages import talking
from tests.command_line import ENVIRONMENT, assert_refused, nbl

pexpect = pytest.importorskip("pexpect", reason="needs pexpect: pip install pexpect")
PROMPT = r"\r\n(\x1b\[\?2004h)?> "
ASKED = "Once upon a time"


@pytest.fixture
def started(talking_out: Path) -> Iterator[Callable[..., Any]]:
    """A chat in a terminal of some width, which waits for the first line."""
    running = []

    def start(columns: int, *words: object) -> Any:
        child = pexpect.spawn(
            sys.executable,
            ["-m", "nbl_export", "chat", str(talking_out), *map(str, words)],
            env={k: v for k, v in ENVIRONMENT.items() if k not in ("COLUMNS", "LINES")},
            dimensions=(40, columns),
            encoding="utf-8",
            timeout=120,
        )
        running.append(child)
        child.expect(PROMPT)
        return child

    yield start
    for child in running:
        child.close(force=True)


def say(child: Any, line: str) -> str:
    """What is on the screen after a line was typed, without what draws it."""
    child.sendline(line)
    child.expect(PROMPT)
    # Of what is drawn while it grows, the last is what stays.
    last = child.before.rpartition("\x1b[?25h")[2]
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).replace("\r", "")


def text_of(out: Path, graph: str, prompt: str, count: int) -> str:
    (found,) = api.generate(out, prompt, api.GenerateSettings(graph, count, raw=True))
    return " ".join(found.text.split())


def test_a_wide_terminal_has_both_side_by_side(started: Callable[..., Any], talking_out: Path) -> None:
    child = started(120, "--max-tokens", 20)
    shown = say(child, ASKED)
    lines = [line for line in shown.splitlines() if line.strip()]
    assert lines[0].split() == ["base", "linearized"]
    left, right = (
        " ".join(" ".join(line[side].split()) for line in lines[1:-2])
        for side in (slice(60), slice(60, None))
    )
    assert left.strip() == text_of(talking_out, "base", f"<s>{ASKED}", 20)
    assert right.strip() == text_of(talking_out, "linearized", f"<s>{ASKED}", 20)
    assert left != right
    assert len(re.findall(r"prefill 5 tokens [\d,]+/s · decode 19 tokens [\d,]+/s", lines[-2])) == 2
    assert lines[-1].split("  ")[0] == "cut at --max-tokens"
    # The second turn reads what is new alone.
    assert len(re.findall(r"prefill [3-9] tokens", say(child, " The"))) == 2
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a_narrow_terminal_has_one_after_the_other_and_commands(
    started: Callable[..., Any], talking_out: Path
) -> None:
    child = started(80, "--max-tokens", 12)
    child.sendline(ASKED)
    child.expect(PROMPT)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", child.before).replace("\r", "")
    base, linearized = (text_of(talking_out, graph, f"<s>{ASKED}", 12) for graph in ("base", "linearized"))
    flat = " ".join(shown.split())
    assert flat.rindex("base ") < flat.rindex(base) < flat.rindex("linearized ") < flat.rindex(linearized)
    assert "/nothing is no command: /reset begins anew" in say(child, "/nothing")
    assert "Begun anew, with this system message." in say(child, "/system One day")
    assert "Begun anew." in say(child, "/reset")
    refused = " ".join(say(child, "a " * 600).split())
    assert re.search(r"The prompt has 60\d tokens, and the model 512 positions: make it shorter\.$", refused)
    assert "prefill" in say(child, ASKED)
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_ctrl_c_ends_the_answer_and_not_the_program(started: Callable[..., Any]) -> None:
    child = started(80, "--graph", "base", "--max-tokens", 500)
    child.sendintr()  # where nothing is answered, the line is begun anew
    child.expect(PROMPT)
    child.sendline(ASKED)
    child.expect("decode")
    child.sendintr()
    child.expect("stopped")
    child.expect(PROMPT)
    assert "Begun anew." in say(child, "/reset")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_without_a_terminal_it_names_the_other_command(talking_out: Path) -> None:
    assert_refused(nbl("chat", talking_out), 2, "needs a terminal", "`nbl-export generate OUT`")


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_obeys_nothing_that_a_model_says(
    talking_out: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """A model that answers with escape sequences: a title, a cleared screen, a link."""
    evil = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ehello"
    load = talking._tokenizer

    class Evil:
        def __init__(self, tokenizer: Any) -> None:
            self._own = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._own, name)

        def __call__(self, *args: Any, **how: Any) -> Any:
            return self._own(*args, **how)

        def __len__(self) -> int:
            return len(self._own)

        def decode(self, tokens: Any, **_: Any) -> str:
            return evil * len(tokens)

    monkeypatch.setattr(talking, "_tokenizer", lambda *given: Evil(load(*given)))
    seen = io.StringIO()
    console = Console(file=seen, width=width, height=30, highlight=False, force_terminal=True, _environ={})
    monkeypatch.setattr(output, "OUT", console)
    with api.chat(talking_out, api.ChatSettings(max_tokens=4, raw=True)) as chat:
        screen._answer(chat, ASKED)
        screen._introduce(chat, Path("\x1b[2Jout"))
    text = re.sub(r"\x1b\[(\?25[lh]|2K|1A|[0-9;]*m)", "", seen.getvalue())  # what rich itself draws with
    assert "hello" in text and not set("\x1b\x07\x9b\u202e") & set(text)
    assert "owned" in text
