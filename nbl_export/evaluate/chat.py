"""Write a conversation in a tokenizer's chat template, in transformers' sandbox."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nbl_export.errors import InputError, first_line
from nbl_export.files import printable

Message = dict[str, str]


def in_chat_template(
    tokenizer: Any, history: Sequence[Message], without: str, add_generation_prompt: bool = True
) -> str:
    """``history`` as text: with the beginning of an answer, or with its last message open.

    Raises :class:`InputError` if the template cannot be used; ``without`` is how a user does without it.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(history),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )
    except Exception as error:  # what a template does can fail in any way
        name = f"The chat template of {tokenizer.name_or_path}"
        said = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(
            printable(f"{name} fails ({said}): {without}, or use the model's original template.")
        ) from None
