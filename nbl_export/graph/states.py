"""The states of a decoder graph: what layers other than softmax attention keep from token to token, of a fixed size.

Past and present of a state have the same name but for this word, as ``past.0.conv`` and ``present.0.conv``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

PAST = re.compile(r"^past_key_values\.(\d{1,6})\.(key|value)$")


@dataclass(frozen=True)
class StatePair:
    """A state of fixed size that a layer without softmax attention keeps: a graph input and an output."""

    past: ir.Value
    present: ir.Value

    @property
    def shape(self) -> tuple[int, ...]:
        """The state's shape without the batch."""
        return tuple(d for d in (self.past.shape or ())[1:] if isinstance(d, int))


def state_pairs(model: ir.Model) -> tuple[StatePair, ...]:
    """The states of a graph in the order of its inputs: past and present have the same name but for this word."""
    outputs = {value.name: value for value in model.graph.outputs}
    pairs = (
        StatePair(value, outputs[name])
        for value in model.graph.inputs
        if not PAST.match(value.name or "")
        and (name := (value.name or "").replace("past", "present", 1)) in outputs
    )
    return tuple(pair for pair in pairs if pair.past is not pair.present and _fixed(pair.past))


def _fixed(value: ir.Value) -> bool:
    """Whether only the batch of ``value`` is open."""
    shape = value.shape
    return shape is not None and len(shape) > 1 and all(isinstance(d, int) for d in shape[1:])
