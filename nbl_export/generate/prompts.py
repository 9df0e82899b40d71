"""What a model is given to read: a conversation in its chat template, or plain text, as tokens; and where it stops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nbl_export.errors import InputError
from nbl_export.evaluate.chat import ChatTemplate, Message
from nbl_export.files import read_json

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
_CONFIGS = ("generation_config.json", "config.json")
NO_TEMPLATE = "this model's tokenizer has no chat template"


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


class Prompts:
    """Conversations as tokens; ``raw``: as plain text, also where the tokenizer has a chat template."""

    def __init__(self, tokenizer: Any, raw: bool = False) -> None:
        self._tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None)) and not raw
        self._template = ChatTemplate(tokenizer, "give --raw") if self.has_template else None

    def of(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """The tokens of each conversation, up to where an answer begins.

        Raises :class:`InputError` if the chat template refuses one, or nothing is left to read.
        """
        if self._template is not None:
            self._template.write((c, True) for c in conversations)
            # The template has written the start token itself.
            found = [self._encoded(self._template(c), special=False) for c in conversations]
        else:
            # An answer goes on where what it answers ends; anything else begins a line.
            texts = ("".join(m["content"] + "\n" * (m["role"] != USER) for m in c) for c in conversations)
            found = [self._plain(text) for text in texts]
        if not all(found):
            raise InputError("The prompt has no tokens: give some text.")
        return found

    def _plain(self, text: str) -> list[int]:
        # As in transformers, but a start token that was written is not doubled.
        start = self._tokenizer.bos_token
        return self._encoded(text, special=not (start and text.startswith(str(start))))

    def _encoded(self, text: str, special: bool) -> list[int]:
        return [int(t) for t in self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]


def stop_tokens(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens after which nothing follows: what the configurations in ``folder`` and the tokenizer say.

    Models name several, for the end of a text and of a turn, and not all in one place.
    """
    found = set(_ids(getattr(tokenizer, "eos_token_id", None)))
    for path in (folder / name for name in _CONFIGS):
        if path.is_file():
            config = read_json(path, "The configuration of the graph", "export the model again")
            nested = config.get("text_config") if isinstance(config, dict) else None
            for each in (config, nested):
                found |= set(_ids(each.get("eos_token_id") if isinstance(each, dict) else None))
    return frozenset(found)


def _ids(value: Any) -> Iterable[int]:
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if type(v) is int and v >= 0]
