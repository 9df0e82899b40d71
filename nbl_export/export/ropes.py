"""Rotary embeddings that go by the longest row of a batch, as functions of the positions: both ways are in the graph.

transformers changes such a module while it runs, by a branch on the last position of the batch: `dynamic` frequencies
of a text beyond the model's positions, and the scale of Phi-3.5-MoE. (The `longrope` of other models is a `where`.) As
there, a shorter row has the frequencies of the longest one, and a cached key those of the step that it is from.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from nbl_export.models.replacing import replaced


@contextmanager
def both_ways(model: torch.nn.Module) -> Iterator[None]:
    """Within the block, no rotary embedding of ``model`` branches, or is changed by what it computes."""
    with ExitStack() as undo:
        for module in model.modules():
            if made := _made(module):
                vars(module)["forward"] = made
                undo.callback(vars(module).pop, "forward")
        yield


def _made(module: Any) -> Callable[..., Any] | None:
    kinds = getattr(module, "rope_type", None)
    kinds = kinds if isinstance(kinds, dict) else {None: kinds}
    if any("dynamic" in str(kind) for kind in kinds.values()):
        return _dynamic(module, kinds)
    forward = inspect.unwrap(type(module).forward)
    if "longrope" in kinds.values() and _branches(forward):
        return _switching(module, forward)
    return None


def _dynamic(module: Any, kinds: dict[str | None, Any]) -> Callable[..., Any]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    whole, own = type(module).forward, inspect.unwrap(type(module).forward)

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        named = {} if layer_type is None else {"layer_type": layer_type}
        kind = str(kinds[layer_type])
        if "dynamic" not in kind:
            return whole(module, x, position_ids, **named)
        prefix = "" if layer_type is None else f"{layer_type}_"
        made = ROPE_INIT_FUNCTIONS[kind](
            module.config, x.device, seq_len=torch.max(position_ids) + 1, **named
        )
        held = copy.copy(module)
        held._buffers = {**module._buffers, f"{prefix}inv_freq": made[0]}
        return own(held, x, position_ids, **named)

    return forward


def _branches(forward: Callable[..., Any]) -> bool:
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):  # code without a file
        return False
    return "torch.max(" in source and "if seq_len >" in source


def _switching(module: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    rope = (
        module.config.rope_parameters
        if hasattr(module.config, "rope_parameters")
        else module.config.rope_scaling
    )
    switch = int(rope["original_max_position_embeddings"])

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        longest = torch.max(position_ids) + 1
        short, long = (_at(length, own, module, x, position_ids) for length in (switch, switch + 1))
        return tuple(torch.where(longest > switch, b, a) for a, b in zip(short, long, strict=True))

    return forward


def _at(
    length: int, own: Callable[..., Any], module: Any, x: torch.Tensor, position_ids: torch.Tensor
) -> Any:
    """What ``own`` gives where the longest row has ``length`` tokens."""
    with replaced(torch, "max", lambda _: length - 1):
        return own(copy.copy(module), x, position_ids)
