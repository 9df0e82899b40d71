"""Conversations in a model's chat template, written in a child process: the template is a program of somebody else's.

Two loops of a hundred thousand steps take hours, and one product of a text takes all memory. All conversations of a
task go to one child, which ends at a limit of time, memory or length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from nbl_export.child_process import ChildError, in_child
from nbl_export.errors import InputError
from nbl_export.printable import printable

_PATIENCE = 30  # seconds for each conversation, and to start with
# Characters that a template may make of a conversation of none, and for each character of one.
_LONGEST, _GROWTH = 1 << 18, 16
_OR = ", or use the model's original template"

Message = dict[str, str]


class ChatTemplate:
    """The chat template of ``tokenizer``; what it has written is kept.

    ``without`` is how a user does without it.
    """

    def __init__(self, tokenizer: Any, without: str = "leave out --chat-template") -> None:
        self._tokenizer, self._without = tokenizer, without
        self._written: dict[str, str] = {}

    def __call__(self, history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """One conversation as text: with the beginning of an answer, or with its last message open."""
        self.write([(history, add_generation_prompt)])
        return self._written[_key(history, add_generation_prompt)]

    def write(self, conversations: Iterable[tuple[Sequence[Message], bool]]) -> None:
        """Have those written that are not yet; raises :class:`InputError` if the template cannot be used."""
        keys = (_key(*conversation) for conversation in conversations)
        if not (missing := [k for k in dict.fromkeys(keys) if k not in self._written]):
            return
        from transformers import PreTrainedTokenizerBase

        own = type(self._tokenizer).apply_chat_template
        if own is not PreTrainedTokenizerBase.apply_chat_template:
            # Code that comes with the model writes them, and the user has said that it may run.
            self._written |= {key: _written(self._tokenizer, key, {}) for key in missing}
            return
        name = printable(f"The chat template of {self._tokenizer.name_or_path}")
        try:
            template = self._tokenizer.get_chat_template()
        except ValueError:  # several, none of them the default
            raise InputError(f"{name} is none that is used by default: {self._without}.") from None
        asked = {
            "name": name,
            "template": template,
            "special": self._tokenizer.special_tokens_map,
            "conversations": missing,
            "remedy": (remedy := self._without + _OR),
        }
        texts: list[str] = []
        try:
            in_child(_write, asked, name, remedy, _PATIENCE, texts.append)
        except ChildError as error:
            raise InputError(printable(str(error))) from None
        self._written |= dict(zip(missing, texts, strict=True))


def _key(history: Sequence[Message], add_generation_prompt: bool) -> str:
    return json.dumps([list(history), add_generation_prompt])


def _written(tokenizer: Any, key: str, special: Any) -> str:
    history, prompt = json.loads(key)
    return str(
        tokenizer.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=prompt,
            continue_final_message=not prompt,
            **special,
        )
    )


def _write(asked: Any, tell: Any) -> None:
    """In the child."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    name, remedy = asked["name"], asked["remedy"]
    # Of a tokenizer, a template sees the special tokens alone.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({})), chat_template=asked["template"]
    )
    for key in asked["conversations"]:
        try:
            text = _written(tokenizer, key, asked["special"])
        except MemoryError:
            raise
        except Exception as error:  # what a template does can fail in any way
            said = (str(error).strip().splitlines() or [""])[0].rstrip(".")[:200]
            raise InputError(printable(f"{name} fails ({type(error).__name__}: {said}): {remedy}.")) from None
        if len(text) > _LONGEST + _GROWTH * len(key):
            raise InputError(
                f"{name} makes {len(text):,} characters of a conversation of {len(key):,}: {remedy}."
            )
        tell(text)
