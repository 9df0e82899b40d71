"""Generate text with the graphs of an output folder; the model that it was made from need not be there any more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import numpy as np

from nbl_export.errors import InputError
from nbl_export.evaluate.answer import (
    ASSISTANT,
    SYSTEM,
    USER,
    Generated,
    Message,
    generate_answer,
    prompt_tokens,
    sampler,
    stop_tokens,
)
from nbl_export.evaluate.scoring import Limits
from nbl_export.graph.io import load_graph
from nbl_export.graph.rounding import needs_emulation
from nbl_export.models.folder import GENERATION, is_causal
from nbl_export.models.load import load_tokenizer
from nbl_export.models.source import ModelSource
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.session import fit, require_onnxruntime, session_bytes
from nbl_export.runtime.stream import Stream
from nbl_export.settings import GenerateSettings
from nbl_export.stages.run import check_baseline, current_rewrite, model_positions
from nbl_export.workspace import BASE, LINEARIZED, Workspace, kept_digests

# Bytes of a session from which on it is said that it is loaded; less takes a moment.
_LONG = 1 << 30
# Positions of a model that says none.
_UNBOUNDED = 1 << 40


def generate(
    out: str | Path,
    prompt: str | Iterable[str],
    settings: GenerateSettings | None = None,
    listener: Listener | None = None,
    trust_remote_code: bool = False,
    rehash: bool = False,
    told: Callable[[str, str], object] = lambda _graph, _piece: None,
    answered: Callable[[Generated], object] = lambda _answer: None,
) -> list[Generated]:
    """What each graph that is asked for generates after ``prompt``, or after each turn of a conversation.

    The model that ``out`` was made from is not needed. ``told`` hears the name of the graph and each piece of text as
    it is generated; once it returns False, no more is generated. ``answered`` hears of each answer.

    Raises :class:`InputError` for a folder of an encoder, without the graphs asked for, or without a tokenizer.
    """
    settings, listener = settings or GenerateSettings(), listener or Silent()
    settings.check()
    ws = Workspace.open(Path(out), kept_digests(Path(out), rehash, listener))
    graphs = _graphs(ws, settings.graph)
    ws.digests.save()
    require_onnxruntime()
    folder = next(iter(graphs.values())).parent
    # A folder of a graph is one of a model without weights.
    place = str(folder.resolve())
    tokenizer = load_tokenizer(
        ModelSource(str(folder), "folder", None, "", trust_remote_code, path=place, model="", sidecars="")
    )
    if settings.system and not tokenizer.chat_template:
        raise InputError(
            "--system has no place, since this model's tokenizer has no chat template: put it into the prompt."
        )
    limits = Limits(model_positions(ws) or _UNBOUNDED, len(tokenizer))
    stops = stop_tokens(folder, tokenizer)
    begun = [{"role": SYSTEM, "content": settings.system}] if settings.system else []
    turns: dict[str, list[Message]] = {name: list(begun) for name in graphs}
    choose = {name: sampler(settings.temperature, settings.top_p, settings.seed) for name in graphs}
    streams: dict[str, Stream] = {}
    found: list[Generated] = []
    for asked in [prompt] if isinstance(prompt, str) else prompt:
        for name, path in graphs.items():
            turns[name].append({"role": USER, "content": asked})
            tokens = prompt_tokens(tokenizer, turns[name], settings.raw)
            if name not in streams:
                streams[name] = _opened(name, path, listener)
            answer = generate_answer(
                name,
                streams[name],
                tokenizer,
                tokens,
                choose[name],
                stops,
                settings.max_tokens,
                limits,
                lambda piece, name=name: told(name, piece),  # type: ignore[misc]
            )
            turns[name].append({"role": ASSISTANT, "content": answer.text})
            found.append(answer)
            answered(answer)
            if answer.why == "stopped":
                return found
    return found


def _graphs(ws: Workspace, asked: str) -> dict[str, Path]:
    """The files of the graphs that are asked for, by name, the base first."""
    task = str((ws.model_info or {}).get("task", GENERATION))
    if not is_causal(task):
        raise InputError(
            f"{ws.root} is of a model that generates no text ({task}): only language models with their own head do."
        )
    found = {}
    if asked != LINEARIZED:
        check_baseline(ws)
        ws.require("export")
        found[BASE] = ws.baseline
    if asked != BASE:
        current_rewrite(ws)
        found[LINEARIZED] = ws.model
    return found


def _opened(name: str, path: Path, listener: Listener) -> Stream:
    """The graph in our own loop. What ONNX Runtime's CPU provider has no kernels for is computed in float32."""
    size = session_bytes(path)
    small = not fit(size)
    with listener.task(f"Loading {name}", 1, "graph") if size >= _LONG else nullcontext() as task:
        stream = None
        if needs_emulation(load_graph(path)):
            try:
                stream = ort_stream(path, 1, rounded=False, small=small)
                stream.prefill([np.zeros(1, dtype=np.int64)])
            except InputError:
                stream = None
                listener.note(
                    f"{name} is computed in float32 and rounded, since ONNX Runtime's CPU provider does not run it as "
                    "it is: its speed says nothing."
                )
        stream = stream or ort_stream(path, 1, small=small)
        if task:
            task.advance(1)
    return stream
