"""State what is verified, on which text, and collect what is found.

The text has ragged prompts in one batch, and for each length that a model knows prompts that cross it. A row longer
than the length shows that a prefill computes what begins there, a row that is decoded across it that the steps do. A
length that takes too long on the model itself was crossed by its exporter, if that is ours, on a copy of the model in
which it is small. An encoder has no steps: each of its rows that cross a length has a short one beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from nbl_export.batch import PIXELS, TOKENS, Inputs, batch_of_rows, words
from nbl_export.blocks import Block
from nbl_export.calibrate.text import CalibrationText
from nbl_export.engine.manifest import EngineFile
from nbl_export.errors import InputError
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import Precision, graph_precision
from nbl_export.graph.rounding import UNTIMED, needs_emulation
from nbl_export.graph.summary import OnCopy, ProvenTensors
from nbl_export.linearize.plan import Plan
from nbl_export.models.folder import Pooling, Task
from nbl_export.models.layers import positions
from nbl_export.models.lengths import Crossed, crossed_by, crossing_prompts
from nbl_export.progress import Listener
from nbl_export.records import Check, Status
from nbl_export.settings import VerifySettings
from nbl_export.verify.parity.compare import Text
from nbl_export.verify.parity.figures import (
    Crossing,
    DecoderParity,
    EncoderParity,
    EngineParity,
    Likeness,
    MethodLoss,
)
from nbl_export.verify.speed.values import Speed

Rows = list[NDArray[np.int32]]


@dataclass(frozen=True)
class Case:
    """The graph ``rewritten`` from ``baseline`` by ``plan``, held against ``model`` as the ``settings`` say.

    ``baseline`` is None where the unmodified graph is not there: what is measured against it is left out. ``tensors``
    are those that were proven in it; ``copies`` are the model's lengths that its exporter crossed on a copy of it.
    """

    model: torch.nn.Module
    plan: Plan
    baseline: Path | None
    rewritten: Path
    settings: VerifySettings
    listener: Listener
    tensors: Mapping[Block, ProvenTensors] = field(default_factory=dict, kw_only=True)
    copies: tuple[OnCopy, ...] = field(default=(), kw_only=True)

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


@dataclass(frozen=True)
class DecoderCase(Case):
    """A decoder, the ``text`` whose held-out part it is judged on, and the ``engines`` built of its graphs, if any.

    ``passed_over`` says why there are none if there are others.
    """

    text: CalibrationText
    engines: tuple[EngineFile, ...] = ()
    passed_over: str | None = None

    def rows(self, prompts: Sequence[int]) -> Rows:
        """Rows of held-out text: prompts of these lengths, and as many tokens after each as steps are decoded.

        Prompts begin with the beginning-of-text token, as in use: without it the attention sinks of a linearized
        model settle on chance tokens, which can amplify rounding a hundredfold.
        """
        ends = np.cumsum([prompt + self.settings.decode_steps for prompt in prompts])
        pieces = np.split(np.resize(words(self.text.heldout).reshape(-1), ends[-1]), ends[:-1])
        return [self.text.prompt(piece) for piece in pieces]


@dataclass(frozen=True)
class EncoderCase(Case):
    """An encoder: ``heldout`` are batches of one ``unit`` each, padded together with the token ``pad``."""

    task: Task
    pooling: Pooling | None
    heldout: Sequence[Inputs]
    unit: str
    pad: int = 0
    left: bool = False

    def row(self, tokens: int) -> dict[str, NDArray[Any]]:
        """A row of held-out text with that many tokens, the ends of the first document around several."""
        first = self.heldout[0]
        flat = {name: np.concatenate([row[name][0] for row in self.heldout]) for name in first}
        return {
            n: np.concatenate([np.resize(a, tokens - 1), first[n][0, -1:]])[None] for n, a in flat.items()
        }


# the text -----------------------------------------------------------------------------------------

# Ragged on purpose: the batch must be padded on the left, by different amounts.
PROMPTS = (64, 41, 23)


def scaled_prompts(longest: int) -> list[int]:
    """The lengths of :data:`PROMPTS`, none above ``longest``: scaled, not cut, so that the batch stays ragged."""
    scale = min(1.0, longest / max(PROMPTS))
    return [max(1, int(p * scale)) for p in PROMPTS]


def fitting_prompts(positions: int | None, start: int, steps: int) -> list[int]:
    """Lengths of prompts that leave room for ``start`` tokens before and ``steps`` after them in the ``positions``.

    They are shorter only for a model with few positions. Raises :class:`InputError` for more steps than fit.
    """
    if positions is None or start + max(PROMPTS) + steps <= positions:
        return list(PROMPTS)
    longest = min(max(PROMPTS), positions // 2)
    if (most := positions - start - longest) < steps:
        raise InputError(
            f"--decode-steps asks for {steps:,} steps after a prompt of {start + longest} tokens, the model has "
            f"{positions:,} positions: ask for {max(most, 1):,} or fewer."
        )
    return scaled_prompts(longest)


def parity_text(case: DecoderCase, cached: bool) -> tuple[Text, tuple[Crossing, ...]]:
    """The text that a graph is run on, and how it crosses the lengths of the model.

    Raises :class:`~nbl_export.errors.InputError` for more decode steps than the model has positions.
    """
    prompts = fitting_prompts(positions(case.model), len(case.text.start), case.settings.decode_steps)
    return text_of(case, prompts, cached)


def text_of(
    case: DecoderCase, prompts: Sequence[int], cached: bool = True, fits: Callable[[int], bool] = bool
) -> tuple[Text, tuple[Crossing, ...]]:
    """Ragged ``prompts``, and those that cross the model's lengths and ``fits``, each a batch of its own."""
    steps, start = case.settings.decode_steps, len(case.text.start)
    crossed = crossed_by(
        case.model, steps, [start + prompt for prompt in prompts], 1 if cached else 1 + steps
    )
    alone = filter(fits, crossing_prompts(crossed))
    rows = case.rows([*prompts, *(max(1, prompt - start) for prompt in alone)])
    text = Text(rows[: len(prompts)], steps, rows[len(prompts) :], cached)
    return text, tuple(_said(one, case.copies) for one in crossed)


def crossing_batches(case: EncoderCase, ragged: Inputs) -> tuple[list[Inputs], tuple[Crossing, ...]]:
    """Batches of text that cross those lengths of an encoder that the ``ragged`` one does not, and how each is."""
    if PIXELS in ragged:
        return [], ()
    crossed = crossed_by(case.model, 0, [ragged[TOKENS].shape[1]])
    batches: list[Inputs] = [
        batch_of_rows([case.row(tokens), case.row(3)], case.pad, case.left)
        for tokens in crossing_prompts(crossed)
    ]
    return batches, tuple(_said(one, case.copies) for one in crossed)


def _said(crossed: Crossed, copies: Sequence[OnCopy]) -> Crossing:
    length = crossed.length
    said = partial(Crossing, length.key, length.tokens, length.layers)
    if not crossed.why:
        return said("rows", crossed.prompts)
    if not crossed.reached:
        return said("never", why=crossed.why)
    copy = next((one for one in copies if (one.key, one.tokens) == (length.key, length.tokens)), None)
    if copy is not None and copy.small is not None:
        return said("copy", small=copy.small)
    return said("not", why=copy.why if copy else crossed.why)


def crossing_check(crossings: Sequence[Crossing]) -> tuple[Check, ...]:
    """The line of a report about the lengths of a model that has some."""
    if not crossings:
        return ()
    status: Status = "skipped" if any(one.how == "not" for one in crossings) else "passed"
    return (Check("lengths", status, "; ".join(one.said for one in crossings)),)


def only_beyond(crossings: Sequence[Crossing]) -> str:
    """Where parity is lost if it holds for the ragged rows, which are as short as a text of every day."""
    names = ", ".join(f"{one.key} {one.tokens:,}" for one in crossings if one.prompts)
    return f"only the rows that cross {names} differ: what begins there is not in the graph as it is in the model"


# what is found ------------------------------------------------------------------------------------


@dataclass
class Measurement:
    """The sections, verdicts and notes of a report, in their order.

    A section that was not run is None, and a check says why; ``divergence`` is where parity is lost, if it is.
    """

    parity: DecoderParity | EncoderParity | None = None
    divergence: str | None = None
    method_loss: MethodLoss | Likeness | None = None
    speed: Speed | None = None
    engine_parity: EngineParity | None = None
    engine_speed: Speed | None = None
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, name: str, status: Status, detail: str) -> None:
        self.checks.append(Check(name, status, detail))

    def judge(self, name: str, failures: Sequence[str], within: str) -> None:
        """The verdict called ``name``: its failures, or ``within`` which gates it passed."""
        self.check(name, "failed" if failures else "passed", "; ".join(failures) or within)

    def judge_parity(self, failures: Sequence[str], within: str, lost: Callable[[], str | None]) -> None:
        """Parity's verdict; ``lost`` finds where what failed is lost."""
        if failures:
            self.divergence = lost()
        self.judge("parity", [*failures, *([self.divergence] if self.divergence else [])], within)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Give the first check that is added meanwhile the seconds it took: the others judge what was measured with it.

        A part that was skipped has no time.
        """
        first, begin = len(self.checks), time.perf_counter()
        yield
        if len(self.checks) > first and self.checks[first].status != "skipped":
            self.checks[first] = replace(self.checks[first], seconds=time.perf_counter() - begin)
