"""Which experts a mixture of experts sends its tokens to: as PyTorch chooses them, or as it is told.

A router takes the k largest scores of each token. Where two scores are nearly equal, rounding decides between them, and
the token's stream is then another one: far more than rounding has moved. So what two computations of a model give is
compared with the same choices in both, and the choices by themselves, by the scores that they fall short of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from nbl_export.batch.arrays import BOOL, F32, I64
from nbl_export.batch.rows import by_token

_TOP_K = (torch.topk, torch.Tensor.topk)


@dataclass(frozen=True)
class Choice:
    """What one router did in a pass: ``scores`` [tokens, …, n] of the tokens that are no padding.

    ``own`` [tokens, …, k] are the places that it chooses by them.
    """

    scores: F32
    own: I64


class Routers(TorchFunctionMode):
    """Within the block, the choices of every router in each pass of a model are kept.

    ``real`` has the positions [batch, sequence] of each pass that are no padding. With ``told``, for each pass what
    each router chooses for its real tokens, it chooses that, and weighs it by its own scores. ``passes`` are the
    choices, in the order of the model's code; None for a top-k that is not over tokens.
    """

    def __init__(self, real: Sequence[BOOL], told: Sequence[Sequence[I64 | None]] | None = None) -> None:
        super().__init__()
        self.real, self.told = real, told
        self.passes: list[list[Choice | None]] = [[] for _ in real]
        self._current = -1

    def begin(self, number: int | None = None) -> None:
        """What is computed from now on belongs to the pass of that ``number``, or to the next one."""
        self._current = self._current + 1 if number is None else number

    def chosen(self) -> list[list[I64 | None]]:
        """What each router has chosen by its own scores, pass by pass."""
        return [[None if c is None else c.own for c in choices] for choices in self.passes]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _TOP_K or not 0 <= self._current < len(self.passes):
            return result
        choices, real = self.passes[self._current], self.real[self._current]
        scores, own = args[0], result.indices
        if (
            _axis(scores, args, kwargs or {}) != scores.ndim - 1
            or by_token(own.numpy(force=True), real) is None
        ):
            choices.append(None)
            return result
        kept = (by_token(t.numpy(force=True), real) for t in (scores.float(), own))
        choices.append(Choice(*(part.copy() for part in kept if part is not None)))
        told = self._told(len(choices) - 1)
        if told is None:
            return result
        taken = own.clone()
        flat = taken.view(real.size, *told.shape[1:])
        flat[torch.from_numpy(np.flatnonzero(real)).to(own.device)] = torch.from_numpy(told).to(own)
        return torch.return_types.topk((scores.gather(-1, taken), taken))

    def _told(self, number: int) -> I64 | None:
        told = self.told[self._current] if self.told else ()
        return told[number] if number < len(told) else None


def _axis(scores: torch.Tensor, args: Any, kwargs: Any) -> int:
    given = kwargs.get("dim", args[2] if len(args) > 2 else -1)
    return int(given) % scores.ndim
