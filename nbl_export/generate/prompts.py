"""Turn a conversation into tokens and tokens into text, and find the tokens after which nothing follows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError
from nbl_export.evaluate.chat import Message, in_chat_template
from nbl_export.files import read_json

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_CONFIGS = ("generation_config.json", "config.json")
_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_BEFORE = 8  # tokens of the prompt from which follows whether the text begins with a space
_HELD = 8  # tokens; a character has at most four bytes, so more than this many are no character


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


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
    for path in (folder / name for name in _CONFIGS):
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
        self._shown = self._decoded(self._known)
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """What one more token says, with what was held back; empty as long as a character is not whole."""
        self._new.append(token)
        text = self._decoded([*self._known, *self._new])
        if text.endswith(_UNKNOWN) and len(self._new) < _HELD:
            return ""
        piece = text[len(self._shown) :]
        if piece:  # a special token alone says nothing of how the next one begins
            self._known, self._new = self._new, []
            self._shown = self._decoded(self._known)
        return piece

    def end(self) -> str:
        """What is still held back, where the text ends within a character."""
        return self._decoded([*self._known, *self._new])[len(self._shown) :]

    def _decoded(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
