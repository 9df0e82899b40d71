"""What can be asked of the command that generates text."""

from __future__ import annotations

from dataclasses import dataclass

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.errors import InputError
from nbl_export.settings.definition import (
    ANSWERS,
    Must,
    Settings,
    at_least,
    one_of,
    options,
    setting,
)

BOTH = "both"
GRAPHS = (LINEARIZED, BASE, BOTH)
_SHARE = Must(lambda p: 0 < p <= 1, "is {value}; it must be more than 0 and at most 1")


@options
@dataclass(frozen=True)
class GenerateSettings(Settings):
    """How text is generated, and by which graph.

    graph: The graph that generates; with both, one after the other, each under its name.
    max_tokens: Most tokens of an answer.
    temperature: Divides the logits; 0 always takes the likeliest token.
    top_p: Sample from the likeliest tokens that together have this probability.
    seed: Seed of the sampling.
    raw: Continue the text as it is, without the chat template.
    system: The system message of the chat template.
    """

    graph: str = setting(LINEARIZED, ANSWERS, one_of(GRAPHS), metavar="|".join(GRAPHS))
    max_tokens: int = setting(128, ANSWERS, at_least(1))
    temperature: float = setting(0.0, ANSWERS, at_least(0))
    top_p: float = setting(1.0, ANSWERS, _SHARE)
    seed: int = setting(0, ANSWERS, at_least(0))
    raw: bool = setting(False, ANSWERS)
    system: str | None = setting(None, ANSWERS, metavar="TEXT")

    def check(self) -> None:
        super().check()
        if self.raw and self.system:
            raise InputError("--raw uses no chat template, and --system is a part of it: give one of them.")
