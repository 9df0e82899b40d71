"""What is verified: a model, the plan, both graphs, and how they are asked to be judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch.media_ids import words
from nbl_export.batch.names import BASE, LINEARIZED
from nbl_export.batch.rows import Inputs
from nbl_export.calibrate.text import CalibrationText
from nbl_export.engine.build import EngineFile
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import Precision, graph_precision
from nbl_export.graph.rounding import UNTIMED, needs_emulation
from nbl_export.graph.summary import OnCopy
from nbl_export.linearize.plan import Plan
from nbl_export.models.tasks import Pooling, Task
from nbl_export.progress import Listener
from nbl_export.settings import VerifySettings

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Case:
    """The graph ``rewritten`` from ``baseline`` by ``plan``, held against ``model`` as the ``settings`` say.

    ``baseline`` is None where the unmodified graph is not there: what is measured against it is left out.
    """

    model: torch.nn.Module
    plan: Plan
    baseline: Path | None
    rewritten: Path
    settings: VerifySettings
    listener: Listener

    @cached_property
    def graph(self) -> ir.Model:
        """The rewritten graph; its weights stay on disk."""
        return load_graph(self.rewritten)

    @property
    def precision(self) -> Precision:
        return graph_precision(self.graph)

    @property
    def why_not_timed(self) -> str | None:
        """Why the speed of the graphs is not measured; None if it is."""
        if not self.settings.speed:
            return "--no-speed"
        if self.baseline is None:
            return "the unmodified graph is not there"
        return UNTIMED if needs_emulation(self.graph) else None

    @property
    def graphs(self) -> dict[str, Path]:
        """The graphs that are there, by role."""
        base = {} if self.baseline is None else {BASE: self.baseline}
        return {**base, LINEARIZED: self.rewritten}


@dataclass(frozen=True)
class DecoderCase(Case):
    """A decoder, the ``text`` whose held-out part it is judged on, and the ``engines`` built of its graphs, if any.

    ``passed_over`` says why there are none if there are others. ``copies`` are the model's lengths that its exporter
    crossed on a copy of it.
    """

    text: CalibrationText
    engines: tuple[EngineFile, ...] = ()
    passed_over: str | None = None
    copies: tuple[OnCopy, ...] = ()

    def rows(self, prompts: Sequence[int]) -> list[NDArray[np.int32]]:
        """Rows of held-out text: prompts of these lengths, and as many tokens after each as steps are decoded.

        Prompts begin with the beginning-of-text token, as in use: without it the attention sinks of a linearized
        model settle on chance tokens, which can amplify rounding a hundredfold.
        """
        ends = np.cumsum([prompt + self.settings.decode_steps for prompt in prompts])
        pieces = np.split(np.resize(words(self.text.heldout).reshape(-1), ends[-1]), ends[:-1])
        return [self.text.prompt(piece) for piece in pieces]


@dataclass(frozen=True)
class EncoderCase(Case):
    """An encoder: ``heldout`` are batches of one ``unit`` each, padded together with the token ``pad``.

    ``copies`` as of a :class:`DecoderCase`.
    """

    task: Task
    pooling: Pooling | None
    heldout: Sequence[Inputs]
    unit: str
    pad: int = 0
    left: bool = False
    copies: tuple[OnCopy, ...] = ()

    def row(self, tokens: int) -> dict[str, NDArray[Any]]:
        """A row of held-out text with that many tokens, the ends of the first document around several."""
        first = self.heldout[0]
        flat = {name: np.concatenate([row[name][0] for row in self.heldout]) for name in first}
        return {
            n: np.concatenate([np.resize(a, tokens - 1), first[n][0, -1:]])[None] for n, a in flat.items()
        }
