"""Generate one answer in a conversation: its prompt's tokens, then tokens until the model ends it or has no room."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.errors import InputError, first_line
from nbl_export.evaluate.scoring import Limits, last_logits
from nbl_export.files import printable, read_json
from nbl_export.runtime.stream import Stream

Message = dict[str, str]
SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
# Why an answer is over: the model ended it, or there may be or can be no more tokens, or nobody asked for more.
ENDED, MOST, FULL, STOPPED = "ended", "max-tokens", "positions", "stopped"
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_BEFORE = 8  # tokens of the prompt from which follows whether the text begins with a space
_HELD = 8  # tokens; a character has at most four bytes, so more than this many are no character


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
    tokenizer: Any,
    prompt: Sequence[int],
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
    text, why = TextOfTokens(tokenizer, prompt), ""
    while not why:
        tokens.append(token := choose(logits))
        if token in stops:
            why = ENDED
            break
        pieces.append(text.add(token))
        if pieces[-1] and told(pieces[-1]) is False:
            why = STOPPED
        elif len(tokens) >= most:
            why = MOST
        elif len(prompt) + len(tokens) > limits.positions:
            why = FULL
        else:
            start = time.perf_counter()
            logits = stream.decode([token])[0]
            decode += time.perf_counter() - start
    if why != STOPPED and (held := text.end()):
        pieces.append(held)
        told(held)
    figures = Figures(len(prompt), prefill, len(tokens) - 1, decode)
    return Generated(graph, "".join(pieces), tuple(tokens), why, figures)


# text and tokens -----------------------------------------------------------------------------------


def in_chat_template(
    tokenizer: Any, history: Sequence[Message], without: str, add_generation_prompt: bool = True
) -> str:
    """``history`` as text, in transformers' sandbox: with the beginning of an answer, or with its last message open.

    Raises :class:`InputError` if the template cannot be used; ``without`` is how a user does without it.
    """
    how = {
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": not add_generation_prompt,
    }
    try:
        return str(tokenizer.apply_chat_template(list(history), tokenize=False, **how))
    except Exception as error:  # what a template does can fail in any way
        name = f"The chat template of {tokenizer.name_or_path}"
        said = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            printable(f"{name} fails ({said}): {without}, or use the model's original template.")
        ) from None


def prompt_tokens(tokenizer: Any, conversation: Sequence[Message], raw: bool = False) -> list[int]:
    """The tokens of a conversation up to where an answer begins; as plain text if ``raw`` or without a chat template.

    Raises :class:`InputError` if the chat template refuses it, or nothing is left to read.
    """
    if tokenizer.chat_template and not raw:
        text, special = in_chat_template(tokenizer, conversation, "give --raw"), False
    else:
        # An answer goes on where what it answers ends; anything else begins a line.
        text = "".join(m["content"] + "\n" * (m["role"] != USER) for m in conversation)
        # As in transformers, but a start token that was written is not doubled.
        special = not (tokenizer.bos_token and text.startswith(str(tokenizer.bos_token)))
    found = [int(t) for t in tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]
    if not found:
        raise InputError("The prompt has no tokens: give some text.")
    return found


def stop_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens after which nothing follows: what the configurations in ``folder`` and the tokenizer say.

    Models name several, for the end of a text and of a turn, and not all in one place.
    """
    found = {tokenizer.eos_token_id}
    for path in (folder / "generation_config.json", folder / "config.json"):
        if path.is_file():
            config = read_json(path, "The configuration of the graph", "export the model again")
            for each in (config, config.get("text_config") or {}):
                ids = each.get("eos_token_id")
                found |= set(ids if isinstance(ids, list) else [ids])
    return frozenset(found - {None})


class TextOfTokens:
    """The text of tokens that follow ``before``, piece by piece; special tokens have none.

    A character may be several tokens. Until it is whole it is held back: the decoders of the libraries end their text
    with U+FFFD as long as it is not.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        # The text of a token depends on those before it, so it is what decoding both says beyond decoding those alone.
        self._known = list(before[-_BEFORE:])
        self._new: list[int] = []
        self._shown = self._decoded()

    def add(self, token: int) -> str:
        """What one more token says, with what was held back; empty as long as a character is not whole."""
        self._new.append(token)
        text = self._decoded()
        if text.endswith(_UNKNOWN) and len(self._new) < _HELD:
            return ""
        piece = text[len(self._shown) :]
        if piece:  # a special token alone says nothing of how the next one begins
            self._known, self._new = self._new, []
            self._shown = self._decoded()
        return piece

    def end(self) -> str:
        """What is still held back, where the text ends within a character."""
        return self._decoded()[len(self._shown) :]

    def _decoded(self) -> str:
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self._tokenizer.decode([*self._known, *self._new], **how))
