"""The graphs of an output folder, opened to generate text: which, with which runtime, and the tokenizer beside them.

The folder is enough: the model that it was made from need not be there any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.parts import part
from nbl_export.progress import Listener
from nbl_export.settings import GenerateSettings
from nbl_export.settings.talking import BOTH, GENAI, ORT
from nbl_export.stages.build import model_positions
from nbl_export.stages.rewrite import check_baseline, current_rewrite
from nbl_export.workspace import Workspace

if TYPE_CHECKING:
    from nbl_export.generate.answer import Answer, Figures
    from nbl_export.generate.prompts import Prompts
    from nbl_export.generate.reader import Reader, Row
    from nbl_export.generate.sampling import Sampler
    from nbl_export.runtime.stream import Stream

# Bytes of a session from which on it is said that it is loaded; less takes a moment.
_LONG = 1 << 30


@dataclass(frozen=True)
class Generated:
    """What a graph, ``base`` or ``linearized``, generated; ``tokens`` have the stop token, if there is one.

    ``why`` is ``ended`` (a stop token), ``max-tokens``, ``positions`` (the model's last one) or ``stopped`` (by the
    caller). ``runtime`` is the one that ran the graph.
    """

    graph: str
    runtime: str
    text: str
    tokens: tuple[int, ...]
    why: str
    figures: Figures


@dataclass
class Opened:
    """A graph that reads: ``name`` is its role."""

    name: str
    runtime: str
    reader: Reader


class Talk:
    """What an output folder generates with: its graphs, and what prompts and stop tokens are made of.

    Raises :class:`InputError` for a folder of an encoder, without the graphs that ``settings`` ask for, or without a
    tokenizer; nothing is loaded but the latter. With ``lenient``, of both graphs one is enough.
    """

    def __init__(
        self,
        ws: Workspace,
        settings: GenerateSettings,
        listener: Listener,
        trust_remote_code: bool = False,
        lenient: bool = False,
    ) -> None:
        from nbl_export.generate.prompts import NO_TEMPLATE, Prompts, stop_tokens
        from nbl_export.runtime.session import require_onnxruntime

        self.ws, self.settings, self._listener = ws, settings, listener
        _check_decoder(ws)
        if settings.runtime == GENAI:
            _require_genai()
        self.graphs = _graphs(ws, settings.graph, listener if lenient else None)
        ws.digests.save()
        require_onnxruntime()
        self.positions = model_positions(ws)
        folder = next(iter(self.graphs.values())).parent
        self.tokenizer = _tokenizer(folder, trust_remote_code)
        self.prompts: Prompts = Prompts(self.tokenizer, settings.raw)
        if settings.system and not self.prompts.has_template:
            raise InputError(f"--system has no place, since {NO_TEMPLATE}: put it into the prompt.")
        self.stops = stop_tokens(folder, self.tokenizer)

    @contextmanager
    def opened(self, *names: str) -> Iterator[list[Opened]]:
        """The graphs called ``names``, all in memory within the block."""
        from nbl_export.runtime.sizes import fit, session_bytes

        sizes = [session_bytes(self.graphs[name]) for name in names]
        small = not fit(*sizes)
        found = []
        for name, size in zip(names, sizes, strict=True):
            if size >= _LONG:
                with self._listener.task(f"Loading {name}", 1, "graph") as task:
                    found.append(self._open(name, small))
                    task.advance(1)
            else:
                found.append(self._open(name, small))
        yield found

    def answer(self, opened: Opened, prompt: Sequence[int], sampler: Sampler) -> Answer:
        """An answer, of which nothing is computed yet; raises :class:`InputError` for a prompt that is too long."""
        from nbl_export.generate.answer import Answer
        from nbl_export.generate.text import TextOfTokens

        def text_of(before: Sequence[int]) -> TextOfTokens:
            return TextOfTokens(self.tokenizer, before)

        return Answer(opened.reader, prompt, text_of, sampler, self.stops, self.settings.max_tokens)

    def sampler(self) -> Sampler:
        from nbl_export.generate.sampling import Sampler

        return Sampler(self.settings.temperature, self.settings.top_p, self.settings.seed)

    def _open(self, name: str, small: bool) -> Opened:
        from nbl_export.generate.reader import Reader, StreamRow

        if (row := self._in_genai(name)) is not None:
            bounds = [row.positions, *[self.positions] * (self.positions is not None)]
            return Opened(name, "onnxruntime-genai", Reader(row, min(bounds)))
        stream = _stream(self.graphs[name], name, small, self._listener)
        row_of_stream: Row = StreamRow(stream, len(self.tokenizer))
        return Opened(name, "ONNX Runtime", Reader(row_of_stream, self.positions))

    def _in_genai(self, name: str) -> Any:
        """The graph in onnxruntime-genai, or None where that is not asked for or cannot be; a note says why."""
        from nbl_export.generate.genai import GenaiRow, has_config, is_installed, why_not

        path, wanted = self.graphs[name], self.settings.runtime
        if wanted == ORT or (wanted != GENAI and not (is_installed() and has_config(path))):
            return None
        if (why := why_not(path)) is None:
            try:
                return GenaiRow(path)
            except InputError as error:
                why = str(error)
        if wanted == GENAI:
            raise InputError(f"{why.rstrip('.')}: leave out --runtime genai.")
        self._listener.note(f"{name} runs in ONNX Runtime: {why}")
        return None


def generated(opened: Opened, answer: Answer) -> Generated:
    return Generated(
        opened.name, opened.runtime, answer.text, tuple(answer.tokens), answer.why, answer.figures
    )


def _check_decoder(ws: Workspace) -> None:
    from nbl_export.models.tasks import GENERATION, is_causal

    info = ws.model_info or {}
    task = str(info.get("task", GENERATION))
    if not is_causal(task):
        raise InputError(
            f"{ws.root} is of a model that generates no text ({task}): only language models with their own head do."
        )


def _require_genai() -> None:
    from nbl_export.generate.genai import is_installed

    if not is_installed():
        line = part("onnxruntime-genai").pip
        raise MissingDependencyError(
            f"onnxruntime-genai is not installed: {line}, or leave out --runtime genai."
        )


def _graphs(ws: Workspace, asked: str, lenient: Listener | None) -> dict[str, Path]:
    """The files of the graphs that are asked for, by name, the base first."""
    found = {}
    if asked != LINEARIZED:
        try:
            check_baseline(ws)
            ws.require("export")
            found[BASE] = ws.baseline
        except InputError as error:
            record = ws.record("export")
            if lenient is None or asked != BOTH or not (record and record.dropped):
                raise
            lenient.note(f"The linearized graph alone answers: {error}")
    if asked != BASE:
        current_rewrite(ws)
        found[LINEARIZED] = ws.model
    return found


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from nbl_export.models.load import load_tokenizer
    from nbl_export.models.source import ModelSource

    # A folder of a graph is one of a model without weights.
    source = ModelSource(
        str(folder), "folder", None, "", trust_remote_code, path=str(folder.resolve()), model="", sidecars=""
    )
    return load_tokenizer(source)


def _stream(path: Path, name: str, small: bool, listener: Listener) -> Stream:
    """The graph in our own loop. What ONNX Runtime's CPU provider has no kernels for is computed in float32."""
    import numpy as np

    from nbl_export.graph.half_emulation import needs_emulation
    from nbl_export.graph.io import load_graph
    from nbl_export.runtime.ort import ort_stream

    if needs_emulation(load_graph(path)):
        try:
            stream = ort_stream(path, 1, rounded=False, small=small)
            stream.prefill([np.zeros(1, dtype=np.int64)])
            return stream
        except InputError:
            listener.note(
                f"{name} is computed in float32 and rounded, since ONNX Runtime's CPU provider does not run it as it "
                "is: its speed says nothing."
            )
    return ort_stream(path, 1, small=small)
