"""Progress: a bar for each task, and lines where no bar can be drawn."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nbl_export.cli import bars
from nbl_export.cli.bars import TerminalListener


def test_a_task_of_parts_says_which_it_is_at_within_eighty_columns(screen: Any) -> None:
    err = screen("err", width=80, colours=True)
    with TerminalListener().task("Calibrating layer", 5_242_880, "tokens") as task:
        for layer in range(80):
            task.part(layer + 1, 80)
            task.advance(65_536)
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", err.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert "Calibrating layer 80/80" in lines[-1] and "5.24M/5.24M tokens" in lines[-1]
    # One line that is drawn over itself, never a second one.
    assert all(len(line.rstrip()) <= 80 and "Calibrating layer" in line for line in lines)
    assert err.getvalue().count("\n") <= 1


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.12345, "0.123"),
        (9, "9"),
        (12.6, "13"),
        (9_999, "9,999"),
        (10_000, "10.0k"),
        (65_536, "65.5k"),
        (999_999, "1000.0k"),
        (5_242_880, "5.24M"),
    ],
)
def test_numbers_in_progress_are_short(number: float, text: str) -> None:
    assert bars._short(number) == text


def drawn(listener: TerminalListener) -> list[Any]:
    assert listener._drawn is not None
    return list(listener._drawn.tasks)


def test_a_task_within_another_is_a_bar_below_it_until_it_ends(screen: Any) -> None:
    err = screen("err")
    listener = TerminalListener()
    for title in ("First", "Second"):
        with listener.task(title, 2, "layers") as outer:
            with listener.task(f"within {title}", 1, "model") as inner:
                inner.advance(1)
                assert [(t.description, t.visible) for t in drawn(listener)] == [
                    (title, True),
                    (f"within {title}", True),
                ]
            outer.advance(2)
    words = [line.split("━")[0].split(None, 1)[1].strip() for line in err.getvalue().splitlines()]
    assert words == ["First", "Second"]
    with pytest.raises(ValueError, match="x"), listener.task("Third", 1, "layers"):
        raise ValueError("x")
    with listener.task("Fourth", 1, "layers"):
        pass
    assert "Fourth" in err.getvalue()


def test_a_log_gets_lines_where_no_bar_is_drawn(screen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar would say nothing before it ends, after hours."""
    monkeypatch.setattr(bars, "_LINES", 0)
    err, on_terminal = screen("err", width=80), "·"
    with TerminalListener().task("Calibrating layer", 40_000, "tokens") as task:
        task.part(4, 4)
        task.advance(30_000)
    assert err.getvalue().startswith("· Calibrating layer 4/4: 30.0k/40.0k tokens, ")
    terminal = screen("err", width=80, colours=True)
    with TerminalListener().task("Calibrating layer", 4, "tokens") as task:
        task.advance(4)
    assert on_terminal not in terminal.getvalue()
