"""The text of parity: ragged prompts in one batch, and for each length that a model knows prompts that cross it.

A row longer than the length shows that a prefill computes what begins there, a row that is decoded across it that the
steps do. A length that takes too long on the model itself was crossed by its exporter, if that is ours, on a copy of
the model in which it is small. An encoder has no steps: each of its rows that cross a length has a short one beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.names import PIXELS, TOKENS
from nbl_export.batch.rows import Inputs, batch_of_rows
from nbl_export.checks import Check, Status
from nbl_export.graph.summary import OnCopy
from nbl_export.models.layers import positions
from nbl_export.models.lengths import Crossed, crossed_by, crossing_prompts
from nbl_export.verify.case import DecoderCase, EncoderCase
from nbl_export.verify.engines import fitting_prompts
from nbl_export.verify.parity.figures import Crossing

Rows = list[NDArray[np.int32]]


def parity_text(case: DecoderCase, cached: bool) -> tuple[Rows, Rows, tuple[Crossing, ...]]:
    """The ragged rows of one batch, the rows that are batches of their own, and what these cross.

    Raises :class:`~nbl_export.errors.InputError` for more decode steps than the model has positions.
    """
    steps, start = case.settings.decode_steps, len(case.text.start)
    prompts = fitting_prompts(positions(case.model), start, steps)
    whole = [start + prompt for prompt in prompts]
    crossed = crossed_by(case.model, steps, whole, 1 if cached else 1 + steps)
    alone = crossing_prompts(crossed)
    rows = case.rows([*prompts, *(max(1, prompt - start) for prompt in alone)])
    return rows[: len(prompts)], rows[len(prompts) :], tuple(_said(one, case.copies) for one in crossed)


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
    facts = (length.key, length.tokens, length.layers)
    if not crossed.why:
        return Crossing(*facts, "rows", crossed.prompts)
    if not crossed.reached:
        return Crossing(*facts, "never", why=crossed.why)
    for copy in copies:
        if (copy.key, copy.tokens) == (length.key, length.tokens):
            if copy.small is not None:
                return Crossing(*facts, "copy", small=copy.small)
            return Crossing(*facts, "not", why=copy.why)
    return Crossing(*facts, "not", why=crossed.why)


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
