"""An encoder as a function from its positional inputs to the outputs of its task."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nbl_export.batch.names import BATCH, MASK, PIXELS, TOKEN_TYPES, TOKENS
from nbl_export.batch.rows import Inputs
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.forward import CachedDecoder
from nbl_export.models.layers import accepted_arguments, backbone, scoring_head
from nbl_export.models.pooling import SENTENCE, Pooling, last_token, pool
from nbl_export.models.tasks import Task

_STATES, _LOGITS = "last_hidden_state", "logits"
Around = Callable[[torch.Tensor, torch.Tensor], AbstractContextManager[Any]]
INPUT_ORDER = (TOKENS, MASK, TOKEN_TYPES, PIXELS)


class Encoder(CachedDecoder):
    """A model as a function from its positional ``inputs`` to its ``outputs``.

    If it is ``scored``, its logits are those of each row's last token. Which that is comes from the mask; transformers
    looks for the padding token, and takes the last token of the row where the configuration names none. With a mask
    it is run within ``around`` it and the tokens.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        pooling: Pooling | None,
        scored: bool = False,
        around: Around | None = None,
    ) -> None:
        super().__init__(model)
        self.around = around
        self.inputs, self.outputs, self.pooling = inputs, outputs, pooling
        self.scored, self.causal = scored, dummy_run(model).causal

    # torch.export needs named arguments; no encoder has more than three.
    def forward(
        self, first: torch.Tensor, second: torch.Tensor | None = None, third: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self.inputs, (first, second, third), strict=False))
        mask = given.get(MASK)
        with nullcontext() if self.around is None or mask is None else self.around(mask, first):
            return self._outputs(first, mask, given)

    def _outputs(
        self, first: torch.Tensor, mask: torch.Tensor | None, given: dict[str, torch.Tensor | None]
    ) -> tuple[torch.Tensor, ...]:
        if self.outputs == (_LOGITS,) and self.scored:
            assert mask is not None  # decoders read text
            body = backbone(self.model)
            states = body(**given, **self._positions(first, mask), **_uncached(body))[_STATES]
            head: Any = self.model.get_submodule(str(scoring_head(self.model)))
            return (head(last_token(states, mask)),)
        output: Any = self.model(**given, **self._positions(first, mask), **_uncached(self.model))
        found = {name: output[name] for name in self.outputs if name != SENTENCE}
        if self.pooling is not None:
            assert mask is not None  # only text is pooled
            found[SENTENCE] = pool(self.pooling, output[_STATES], mask)
        return tuple(found[name] for name in self.outputs)

    def _positions(self, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Positions for every row: by default a rotary model uses one row, which RotaryEmbedding does not accept.

        A decoder counts from the first token that is no padding, so that a row has one result, wherever it is padded.
        """
        if self.causal and mask is not None:
            return accepted_arguments(backbone(self.model), position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        rotary = any("rotary" in type(m).__name__.lower() for m in self.model.modules())
        if not rotary or PIXELS in self.inputs:
            return {}
        positions = torch.arange(ids.shape[1], device=ids.device)[None].expand(ids.shape)
        return accepted_arguments(self.model, position_ids=positions)


def _uncached(model: torch.nn.Module) -> dict[str, Any]:
    """No cache, as a decoder would fill by itself: one of a window branches on the length of the text."""
    return accepted_arguments(model, use_cache=False)


def encoder_outputs(
    model: torch.nn.Module, task: Task, pooling: Pooling | None
) -> dict[str, tuple[str, ...]]:
    """The outputs of a graph of ``model``, with their dynamic dimensions."""
    given = set(dummy_run(model).outputs)
    found = {name: dims for name, dims in task.outputs.items() if name in given}
    return found | ({SENTENCE: (BATCH,)} if pooling else {})


def encoder_of(
    model: torch.nn.Module,
    task: Task,
    pooling: Pooling | None,
    inputs: Inputs,
    around: Around | None = None,
) -> Encoder:
    """``model`` as a function of the inputs named in the batch ``inputs``."""
    names = tuple(name for name in INPUT_ORDER if name in inputs)
    scored = task.pools and dummy_run(model).causal
    return Encoder(model, names, tuple(encoder_outputs(model, task, pooling)), pooling, scored, around)
