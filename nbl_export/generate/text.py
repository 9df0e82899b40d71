"""Generated tokens as text, piece by piece.

A character may be several tokens: of a byte-level vocabulary, or by bytes that stand for what a vocabulary does not
have. Until it is whole it is held back. The decoders of the libraries do not say whether it is, but end their text with
U+FFFD as long as it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
_BEFORE = 8  # tokens of the prompt from which follows whether the text begins with a space
_HELD = 8  # tokens; a character has at most four bytes, so more than this many are no character


class TextOfTokens:
    """The text of tokens that follow ``before``; special tokens have none."""

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
        rest = self._decoded([*self._known, *self._new])[len(self._shown) :]
        self._new = []
        return rest

    def _decoded(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
