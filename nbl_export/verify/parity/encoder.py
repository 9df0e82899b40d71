"""Parity of an encoder: does every output of the graph equal PyTorch's with the same plan?

Both run one ragged batch, padded as the tokenizer does it, or one batch of images. Only real tokens are
compared. The figures are those of :mod:`.parity`, for the vectors of each output by itself: an output of
logits is held to the gates of logits, any other (states, pooled vectors) by its relative difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.rows import Inputs, real_positions
from nbl_export.runtime.encoder import Outputs
from nbl_export.verify.parity.decoder import Gates, StepParity, compare_vectors

LOGITS = "logits"
# The cosine of two short vectors of logits near zero tells of rounding, not of the graph.
_LEAST_WIDTH = 16


@dataclass(frozen=True)
class OutputParity:
    """One output: its name, its width, and the figures of its vectors."""

    output: str
    width: int
    figures: StepParity

    def failures(self, g: Gates) -> list[str]:
        f = self.figures
        logits = self.output == LOGITS
        held = [
            ("max |Δlogit|", f.max_abs, g.max_abs_logit, False, logits),
            ("KL", f.max_kl, g.max_kl, False, logits),
            ("top-1 agreement", f.top1, g.top1, True, logits),
            ("max relative difference", f.max_rel, g.max_rel_state, False, not logits),
            ("cosine", f.min_cosine, g.min_cosine, True, self.width >= _LEAST_WIDTH),
        ]
        # Written so that NaN fails.
        return [
            f"{what} of {self.output} is {value:.3g}; the gate is {limit:g}"
            for what, value, limit, low, counts in held
            if counts and not (value >= limit if low else value <= limit)
        ]


@dataclass(frozen=True)
class EncoderParity:
    """All outputs, the lengths of the rows (none for images), and the gates."""

    rows: int
    lengths: tuple[int, ...]
    outputs: tuple[OutputParity, ...]
    gates: Gates

    def failures(self) -> list[str]:
        """One sentence for each gate that fails; empty is a pass."""
        return [failure for output in self.outputs for failure in output.failures(self.gates)]

    def failures_against(self, own: EncoderParity, whose: str) -> list[str]:
        """Like :meth:`failures`, against what is lost in this precision anyway: ``own``, and ``whose`` that is."""
        limit, found = self.gates.max_vs_own, []
        for mine, theirs in zip(self.outputs, own.outputs, strict=True):
            here, allowed = mine.figures.mean_abs, theirs.figures.mean_abs
            if not here <= limit * allowed:
                found.append(
                    f"mean |Δ| of {mine.output} is {here:.3g}, {whose} {allowed:.3g}; the gate is {limit:g} times that"
                )
        return found

    @property
    def worst(self) -> float:
        """The largest difference of any number, relative to the size of its vector."""
        return max(o.figures.max_rel for o in self.outputs)

    def as_json(self) -> dict[str, Any]:
        outputs = [{"output": o.output, "width": o.width, **asdict(o.figures)} for o in self.outputs]
        return {**asdict(self), "outputs": outputs}


def compare_outputs(reference: Outputs, candidate: Outputs, inputs: Inputs, gates: Gates) -> EncoderParity:
    """Every output of the two on the batch ``inputs``; one that is missing differs without bound."""
    found = []
    for name, a in reference.items():
        x, y = (vectors(v, inputs) for v in (a, candidate.get(name, np.full_like(a, np.nan))))
        if x.shape != y.shape:
            y = np.full_like(x, np.nan)
        found.append(OutputParity(name, x.shape[1], compare_vectors(0, x, y, gates.near_tie)))
    lengths: Sequence[int] = [int(n) for n in real_positions(inputs, 0).sum(axis=1) if n]
    return EncoderParity(len(next(iter(inputs.values()))), tuple(lengths), tuple(found), gates)


def vectors(output: NDArray[np.float32], inputs: Inputs) -> NDArray[np.float32]:
    """An output as [vectors, d]: of every real token, or of every row."""
    if output.ndim == 3:
        return output[real_positions(inputs, output.shape[1])]
    return output.reshape(len(output), -1)
