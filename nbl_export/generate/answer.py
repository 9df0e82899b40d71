"""Generate one answer: tokens after a prompt until the model ends it or there is no room, and the time they took."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.errors import InputError
from nbl_export.evaluate.scoring import Limits, last_logits
from nbl_export.generate.prompts import TextOfTokens
from nbl_export.runtime.stream import Stream

# Why an answer is over: the model ended it, or there may be or can be no more tokens, or nobody asked for more.
ENDED, MOST, FULL, STOPPED = "ended", "max-tokens", "positions", "stopped"


def sampler(temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Callable[[NDArray[Any]], int]:
    """What chooses a token of logits [vocab]; two with the same arguments choose the same.

    ``temperature`` divides the logits; 0 takes the likeliest token, the first of several. ``top_p`` leaves the fewest
    likeliest tokens that together have this probability, one at least, as transformers does. Raises
    :class:`InputError` for logits that are no numbers.
    """
    random = np.random.default_rng(seed)

    def choose(logits: NDArray[Any]) -> int:
        values = np.asarray(logits, dtype=np.float64)
        best = int(values.argmax())
        if not np.isfinite(values[best]):
            raise InputError(
                "The graph's logits are not finite, so there is no next token: see what `nbl-export verify` says of it."
            )
        if temperature == 0:
            return best
        with np.errstate(over="ignore"):  # at a temperature near 0 all others are infinitely far
            weights = np.exp((values - values[best]) / temperature)
        order = np.argsort(-weights, kind="stable")
        summed = np.cumsum(weights[order])
        kept = int(np.searchsorted(summed, top_p * summed[-1])) + 1
        place = int(np.searchsorted(summed[:kept], random.random() * summed[kept - 1], side="right"))
        return int(order[min(place, kept - 1)])

    return choose


@dataclass(frozen=True)
class Figures:
    """Seconds of reading a prompt, and of reading generated tokens, with how many there were."""

    prompt_tokens: int
    prefill_seconds: float
    decoded_tokens: int
    decode_seconds: float


@dataclass(frozen=True)
class Generated:
    """What a ``graph``, base or linearized, generated; ``tokens`` have the stop token, if there is one.

    ``why`` it is over is ``ended`` (a stop token), ``max-tokens``, ``positions`` (the model's last one) or ``stopped``
    (by the caller).
    """

    graph: str
    text: str
    tokens: tuple[int, ...]
    why: str
    figures: Figures


def generate_answer(
    graph: str,
    stream: Stream,
    prompt: Sequence[int],
    text: TextOfTokens,
    choose: Callable[[NDArray[Any]], int],
    stops: Collection[int],
    most: int,
    limits: Limits,
    told: Callable[[str], object],
) -> Generated:
    """Up to ``most`` tokens after ``prompt``, of which ``told`` hears each piece of text until it returns False.

    Raises :class:`InputError` for a prompt of more tokens than the model has positions.
    """
    if len(prompt) > limits.positions:
        raise InputError(
            f"The prompt has {len(prompt):,} tokens, and the model {limits.positions:,} positions: make it shorter."
        )
    stream.reserve(min(len(prompt) + most, limits.positions))
    start = time.perf_counter()
    logits = last_logits(stream, [np.array(prompt, dtype=np.int64)], limits.tokens)[0]
    prefill, decode = time.perf_counter() - start, 0.0
    tokens: list[int] = []
    pieces: list[str] = []
    why = ""

    def heard(piece: str) -> bool:
        pieces.append(piece)
        return not piece or told(piece) is not False

    while not why:
        tokens.append(token := choose(logits))
        if token in stops:
            why = ENDED
        elif not heard(text.add(token)):
            why = STOPPED
        elif len(tokens) >= most:
            why = MOST
        elif len(prompt) + len(tokens) > limits.positions:
            why = FULL
        else:
            start = time.perf_counter()
            logits = stream.decode([token])[0]
            decode += time.perf_counter() - start
    if why != STOPPED:
        heard(text.end())
    figures = Figures(len(prompt), prefill, len(tokens) - 1, decode)
    return Generated(graph, "".join(pieces), tuple(tokens), why, figures)
