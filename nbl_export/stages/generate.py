"""A prompt → what the graphs of an output folder generate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nbl_export.progress import Listener, Silent
from nbl_export.settings import GenerateSettings
from nbl_export.stages.talking import Generated, Talk, generated
from nbl_export.workspace import Workspace, kept_digests


def generate(
    out: str | Path,
    prompt: str,
    settings: GenerateSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
    told: Callable[[str, str], object] = lambda _graph, _piece: None,
) -> tuple[Generated, ...]:
    """What the linearized graph, the unmodified one or both generate after ``prompt``.

    The model that ``out`` was made from is not needed. ``told`` hears the name of the graph and each piece of text as
    it is generated; once it returns False, no more is generated.
    """
    from nbl_export.generate.prompts import SYSTEM, USER, message

    settings = settings or GenerateSettings()
    settings.check()
    ws = Workspace.open(Path(out), kept_digests(Path(out), rehash, listener))
    talk = Talk(ws, settings, listener or Silent(), trust_remote_code)
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
