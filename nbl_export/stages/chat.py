"""A chat with the graphs of an output folder: each has its own answers, and what it has read is not read again."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nbl_export.errors import InputError
from nbl_export.progress import Listener, Silent
from nbl_export.settings import ChatSettings
from nbl_export.stages.talking import Generated, Opened, Talk, generated
from nbl_export.workspace import Workspace, kept_digests

if TYPE_CHECKING:
    from nbl_export.evaluate.chat import Message
    from nbl_export.generate.answer import Answer
    from nbl_export.generate.sampling import Sampler

# The name of a graph and a piece of its text.
Pieces = Generator[tuple[str, str], None, None]


@dataclass
class _Side:
    opened: Opened
    sampler: Sampler
    history: list[Message] = field(default_factory=list)


class Chat:
    """A conversation with one graph or with both.

    ``graphs`` are their names, ``runtimes`` what runs each.
    """

    def __init__(self, talk: Talk, opened: list[Opened]) -> None:
        self._talk = talk
        self._sides = [_Side(each, talk.sampler()) for each in opened]
        self._system = talk.settings.system
        self._answers: list[Answer] = []

    @property
    def answers(self) -> tuple[Generated, ...]:
        """The last ones as far as they are, one of each graph."""
        return tuple(generated(s.opened, a) for s, a in zip(self._sides, self._answers, strict=False))

    @property
    def graphs(self) -> tuple[str, ...]:
        return tuple(side.opened.name for side in self._sides)

    @property
    def runtimes(self) -> dict[str, str]:
        return {side.opened.name: side.opened.runtime for side in self._sides}

    @property
    def has_template(self) -> bool:
        """Whether messages are written in a chat template; otherwise what is said is continued as plain text."""
        return self._talk.prompts.has_template

    @property
    def positions(self) -> int | None:
        return self._talk.positions

    def reset(self, system: str | None = None) -> None:
        """Begin anew, with another ``system`` message if one is given; empty for none.

        Raises :class:`.InputError` where that has no place.
        """
        from nbl_export.generate.prompts import NO_TEMPLATE

        if system and not self.has_template:
            raise InputError(f"A system message has no place, since {NO_TEMPLATE}, or --raw leaves it out.")
        self._system = self._system if system is None else system
        for side in self._sides:
            side.history = []

    def ask(self, text: str, together: bool = True) -> Pieces:
        """The answers to ``text``, as names of graphs with pieces of text; ``together``: a token of each in turn.

        An iterator that is closed ends the answers, which remain as far as they are. Raises :class:`.InputError` for
        what the chat template refuses, and for more tokens than the model has positions; then nothing was said.
        """
        from nbl_export.generate.answer import TooLong
        from nbl_export.generate.prompts import SYSTEM, USER, message

        system = [message(SYSTEM, self._system)] if self._system else []
        asked = message(USER, text)
        prompts = self._talk.prompts.of([[*system, *side.history, asked] for side in self._sides])
        try:
            answers = [
                self._talk.answer(side.opened, prompt, side.sampler)
                for side, prompt in zip(self._sides, prompts, strict=True)
            ]
        except TooLong as error:
            remedy = (
                "make it shorter, or begin anew"
                if any(side.history for side in self._sides)
                else "make it shorter"
            )
            raise TooLong(error.tokens, error.positions, remedy) from None
        self._answers = answers
        return self._answered(asked, answers, together)

    def _answered(self, asked: Message, answers: list[Answer], together: bool) -> Pieces:
        from nbl_export.generate.prompts import ASSISTANT, message

        going = [
            (side.opened.name, answer.pieces()) for side, answer in zip(self._sides, answers, strict=True)
        ]
        try:
            while going:
                for name, pieces in list(going) if together else going[:1]:
                    piece = next(pieces, None)
                    if piece is None:
                        going.remove((name, pieces))
                    else:
                        yield name, piece
        finally:
            for _, pieces in going:
                pieces.close()
            for side, answer in zip(self._sides, answers, strict=True):
                if answer.text:  # messages of both take turns
                    side.history += [asked, message(ASSISTANT, answer.text)]


@contextmanager
def chat(
    out: str | Path,
    settings: ChatSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
) -> Iterator[Chat]:
    """A chat with both graphs, or with one: ``for graph, piece in chat.ask("Hello"): ...``, turn after turn."""
    settings = settings or ChatSettings()
    settings.check()
    ws = Workspace.open(Path(out), kept_digests(Path(out), rehash, listener))
    talk = Talk(ws, settings, listener or Silent(), trust_remote_code, lenient=True)
    with talk.opened(*talk.graphs) as opened:
        yield Chat(talk, opened)
