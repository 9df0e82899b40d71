"""Run an encoder as a function from its positional inputs to the outputs of its task, pooled where it says so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from nbl_export.batch.names import BATCH, MASK, PIXELS, TOKEN_TYPES, TOKENS
from nbl_export.batch.rows import Inputs
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.forward import CachedDecoder
from nbl_export.models.layers import backbone, scoring_head
from nbl_export.models.libraries import accepted_arguments
from nbl_export.models.tasks import Pooling, Task

SENTENCE = "sentence_embedding"
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
            last = mask is not None and self.scored and self.outputs == (_LOGITS,)
            run: Any = backbone(self.model) if last else self.model
            # No cache, as a decoder would fill by itself: one of a window branches on the length of the text.
            output = run(**given, **self._positions(first, mask), **accepted_arguments(run, use_cache=False))
            if mask is not None and last:
                head: Any = self.model.get_submodule(str(scoring_head(self.model)))
                return (head(last_token(output[_STATES], mask)),)
            found = {name: output[name] for name in self.outputs if name != SENTENCE}
            if mask is not None and self.pooling is not None:
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


def pool(pooling: Pooling, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One vector [batch, d] for each row of ``states`` [batch, sequence, d].

    ``mask`` [batch, sequence] is 0 on padding.
    """
    if pooling.mode == "cls":
        # The first token that is not padding, since padding may be on the left.
        first = mask.argmax(dim=1)[:, None, None].expand(-1, 1, states.shape[-1])
        vector = states.gather(1, first)[:, 0]
    elif pooling.mode == "lasttoken":
        vector = last_token(states, mask)
    elif pooling.mode == "max":
        hidden = (mask == 0)[..., None]
        vector = states.masked_fill(hidden, torch.finfo(states.dtype).min / 2).amax(dim=1)
    else:
        weights = mask[..., None].to(states.dtype)
        vector = (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-9)
    return torch.nn.functional.normalize(vector, dim=-1) if pooling.normalize else vector


def last_token(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The states [batch, d] of each row's last token that is no padding, on whichever side that is."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * places).argmax(dim=1)[:, None, None].expand(-1, 1, states.shape[-1])
    return states.gather(1, last)[:, 0]
