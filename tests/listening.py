"""A listener that writes down what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nbl_export.progress import Silent, Task


class Notes(Silent):
    """Keeps notes, tasks and how far they came; it is its own task, whichever runs."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tasks: list[tuple[str, int, str, int]] = []
        self.advanced: list[int] = []
        self.parts: list[tuple[int, int]] = []

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        self.tasks.append((title, total, unit, done))
        yield self

    def advance(self, amount: int) -> None:
        self.advanced.append(amount)

    def part(self, number: int, count: int) -> None:
        self.parts.append((number, count))

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def start(self) -> tuple[int, int]:
        """Of the last task: its total, and how much of it was done before."""
        _, total, _, done = self.tasks[-1]
        return total, done

    @property
    def kept(self) -> list[str]:
        """The stages that were done already."""
        return [note.split(":")[0] for note in self.notes if note.endswith("done already, kept.")]
