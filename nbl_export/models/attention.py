"""Replace or watch a model's attention, its count of positions in each row, and its routers of experts.

*Sharing*: a layer may attend to the keys and values of another one. It borrows: it has queries of its own, and no entry
in the KV cache. Gemma 3n and Gemma 4 have such layers.

*Positions*: Llama 4 scales the queries of its layers without a rotary embedding by the place of a token in the cache:
one number for all rows of a batch, which is a row's position only where no row is padded and the cache grows. Here the
positions that the model is given scale them, so that every row is computed as it would be alone.

*Routers*: a router takes the k largest scores of each token. Where two scores are nearly equal, rounding decides
between them, and the token's stream is then another one: far more than rounding has moved. So what two computations of
a model give is compared with the same choices in both, and the choices by themselves, by the scores that they fall
short of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode

from nbl_export.batch import BOOL, F32, I64, by_token

if TYPE_CHECKING:
    from nbl_export.models.layers import AttentionModules

# What transformers may give an attention function that sdpa alone knows how to use.
_OF_SDPA = ("position_bias", "s_aux", "softcap")
_TOP_K = (torch.topk, torch.Tensor.topk)


def takes_attention(model: Any) -> bool:
    """Whether the attention of ``model`` uses transformers' interface."""
    return bool(getattr(model, "_supports_attention_backend", False))


@contextmanager
def attending_by(model: Any, name: str, attend: Callable[..., Any]) -> Iterator[None]:
    """Within the block, the attention of ``model`` is ``attend``, with the masks of sdpa, registered as ``name``."""
    before = model.config._attn_implementation
    transformers.AttentionInterface.register(name, attend)
    transformers.AttentionMaskInterface.register(name, transformers.masking_utils.sdpa_mask)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def decoding(model: Any) -> Iterator[None]:
    """Within the block, the attention of a single token per row is fast in half precision on a CPU.

    PyTorch's takes each query head alone, and reads the keys and values of its group anew; here a group is one product.
    Whatever else it is asked for goes to PyTorch's. A model whose attention is not PyTorch's stays as it is.
    """
    if not takes_attention(model) or model.config._attn_implementation != "sdpa":
        yield
        return
    with attending_by(model, "nbl_export_decoding", _attend):
        yield


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    half = query.device.type == "cpu" and query.element_size() == 2
    plain = attention_mask is None and not any(more.get(name) is not None for name in _OF_SDPA)
    if not (half and plain and query.shape[2] == 1):
        found: tuple[torch.Tensor, None] = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
        return found
    batch, heads, _, size = query.shape
    groups = batch * key.shape[1]
    keys, values = (t.reshape(groups, t.shape[2], t.shape[3]) for t in (key, value))
    scale = size**-0.5 if scaling is None else scaling
    scores = torch.bmm(query.reshape(groups, -1, size), keys.transpose(1, 2)).float() * scale
    mixed = torch.bmm(scores.softmax(-1).to(values.dtype), values)
    return mixed.reshape(batch, 1, heads, values.shape[2]), None


def shared_keys(model: Any, layers: Sequence[AttentionModules], run: Callable[[], object]) -> dict[int, int]:
    """The layer whose keys each borrowing layer of ``model`` attends to, in the forward pass that ``run`` makes.

    Empty for a model whose attention does not use transformers' interface.
    """
    if not takes_attention(model):
        return {}
    indices = {model.get_submodule(layer.module): layer.index for layer in layers}
    owners: list[tuple[torch.Tensor, int]] = []
    found: dict[int, int] = {}

    def attend(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        if module in indices:
            lender = next((index for seen, index in owners if seen is key), None)
            if lender is None:
                owners.append((key, indices[module]))
            else:
                found[indices[module]] = lender
        kwargs.pop("softcap", None)  # sdpa has none; what is computed does not matter
        return transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, *args, **kwargs
        )

    with attending_by(model, "nbl_export_watched", attend):
        run()
    return found


# positions ----------------------------------------------------------------------------------------


def count_positions(model: torch.nn.Module) -> None:
    """Have the attention of ``model`` scale its queries by each row's positions, not by places in the cache."""
    for block in list(model.modules()):
        for attention in block.children():
            if getattr(attention, "attn_temperature_tuning", False) and not getattr(
                attention, "use_rope", True
            ):
                attention.attn_temperature_tuning = False  # type: ignore[assignment]
                positions: list[torch.Tensor] = []
                keep, scale = (
                    partial(_keep_positions, positions),
                    partial(_scale_queries, attention, positions),
                )
                block.register_forward_pre_hook(keep, with_kwargs=True)
                attention.q_proj.register_forward_hook(scale)  # type: ignore[operator, union-attr]


def _keep_positions(positions: list[torch.Tensor], _block: Any, _args: Any, kwargs: dict[str, Any]) -> None:
    positions[:] = [kwargs["position_ids"]]


def _scale_queries(
    attention: Any, positions: list[torch.Tensor], _module: Any, _args: Any, queries: Any
) -> Any:
    ahead = torch.floor((positions[0].float() + 1.0) / attention.floor_scale)
    return (queries * (torch.log1p(ahead) * attention.attn_scale + 1.0)[..., None]).to(queries.dtype)


# routers ------------------------------------------------------------------------------------------


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
        axis = (kwargs or {}).get("dim", args[2] if len(args) > 2 else -1)
        if axis % scores.ndim != scores.ndim - 1 or by_token(own.numpy(force=True), real) is None:
            choices.append(None)
            return result
        kept = (by_token(t.numpy(force=True), real) for t in (scores.float(), own))
        choices.append(Choice(*(part.copy() for part in kept if part is not None)))
        every = self.told[self._current] if self.told else ()
        told = every[len(choices) - 1] if len(choices) <= len(every) else None
        if told is None:
            return result
        taken = own.clone()
        flat = taken.view(real.size, *told.shape[1:])
        flat[torch.from_numpy(np.flatnonzero(real)).to(own.device)] = torch.from_numpy(told).to(own)
        return torch.return_types.topk((scores.gather(-1, taken), taken))
