"""A prompt → what the graphs of an output folder generate."""

from __future__ import annotations

from collections.abc import Callable

from nbl_export.progress import Listener
from nbl_export.settings import GenerateSettings
from nbl_export.stages.talking import Generated, Talk, generated
from nbl_export.workspace import Workspace


def generate(
    ws: Workspace,
    prompt: str,
    settings: GenerateSettings,
    listener: Listener,
    told: Callable[[str, str], object] = lambda _graph, _piece: None,
    trust_remote_code: bool = False,
) -> tuple[Generated, ...]:
    """What each graph that is asked for generates after ``prompt``; ``told`` hears its name and each piece of text.

    Once ``told`` returns False, no more is generated.
    """
    from nbl_export.generate.prompts import SYSTEM, USER, message

    talk = Talk(ws, settings, listener, trust_remote_code)
    system = [message(SYSTEM, settings.system)] if settings.system else []
    (tokens,) = talk.prompts.of([[*system, message(USER, prompt)]])
    found = []
    for name in talk.graphs:
        with talk.opened(name) as (opened,):
            answer = talk.answer(opened, tokens, talk.sampler())
            heard = all(told(name, piece) is not False for piece in answer.pieces() if piece)
            found.append(generated(opened, answer))
        del opened, answer  # one graph is in memory at a time
        if not heard:
            break
    return tuple(found)
