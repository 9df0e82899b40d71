"""How far rounding alone moves a model: the scale below which no parity can be asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32, I64
from nbl_export.batch.padding import left_padded
from nbl_export.linearize.swap import linearized
from nbl_export.linearize.sweep import ORIGINAL, version_of, within
from nbl_export.models.libraries import accepted_arguments
from nbl_export.models.walk import Segment, through
from nbl_export.models.weights import device_of, streams
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.torch import uncached_logits

if TYPE_CHECKING:
    import torch

    from nbl_export.linearize.plan import Plan

_LAST_BIT = 2.0**-24  # relative, half a unit in the last place of float32


def rounding_noise(
    model: torch.nn.Module,
    rows: Sequence[NDArray[np.int32]],
    plan: Plan | None = None,
    seed: int = 0,
    listener: Listener | None = None,
) -> float:
    """Largest |Δlogit| of a prefill of ``rows`` when every embedding entry moves by its last bit.

    The signs are random for ``seed``; with a ``plan`` the model is linearized by it. A well-conditioned float32 model
    gives about 1e-4.
    """
    inputs = left_padded(list(rows))
    kept = inputs[1].astype(bool)
    found = []
    with (listener or Silent()).task("Measuring rounding", 2, "passes") as task:
        if streams(model):
            passes = _by_blocks(model, plan, inputs, seed, listener)
        else:
            passes = _in_memory(model, plan, inputs, seed)
        for logits in passes:
            found.append(logits[kept])
            task.advance(1)
    exact, disturbed = found
    return max(float(np.abs(a - b).max()) for a, b in zip(exact, disturbed, strict=True))


@contextmanager
def _disturbed(model: torch.nn.Module, seed: int) -> Iterator[None]:
    import torch

    generator = torch.Generator().manual_seed(seed)

    def disturb(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        return output * (1 + signs * 2 * _LAST_BIT)

    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    hook = embeddings.register_forward_hook(disturb)
    try:
        yield
    finally:
        hook.remove()


def _in_memory(
    model: torch.nn.Module, plan: Plan | None, inputs: tuple[I64, I64, I64], seed: int
) -> Iterator[F32]:
    """Logits of the model and of the disturbed one."""
    with linearized(model, plan) if plan else nullcontext():
        yield uncached_logits(model, *inputs)
        with _disturbed(model, seed):
            yield uncached_logits(model, *inputs)


def _by_blocks(
    model: torch.nn.Module,
    plan: Plan | None,
    inputs: tuple[I64, I64, I64],
    seed: int,
    listener: Listener | None,
) -> Iterator[F32]:
    """Logits of the model and of the disturbed one, both by one pass over the weights."""
    import torch

    ids, mask, positions = (torch.from_numpy(array).to(device_of(model)) for array in inputs)
    batch = {"input_ids": ids, **accepted_arguments(model, attention_mask=mask, position_ids=positions)}
    version = version_of(model, plan) if plan else ORIGINAL

    def of_block(part: Segment) -> AbstractContextManager[Any]:
        return within(model, version, part, plan.fit_input) if plan else nullcontext()

    def of_run(number: int) -> AbstractContextManager[Any]:
        return _disturbed(model, seed) if number else nullcontext()

    for output in through(model, [batch, batch], of_block, of_run, listener):
        yield output.logits.float().cpu().numpy()
