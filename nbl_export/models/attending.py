"""Other functions in the place of a model's attention, through transformers' interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# What transformers may give an attention function that sdpa alone knows how to use.
_OF_SDPA = ("position_bias", "s_aux", "softcap")


def takes_attention(model: Any) -> bool:
    """Whether the attention of ``model`` uses transformers' interface."""
    return bool(getattr(model, "_supports_attention_backend", False))


@contextmanager
def attending_by(model: Any, name: str, attend: Callable[..., Any]) -> Iterator[None]:
    """Within the block, the attention of ``model`` is ``attend``, with the masks of sdpa, registered as ``name``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    before = model.config._attn_implementation
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
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
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    half = query.device.type == "cpu" and query.element_size() == 2
    plain = attention_mask is None and not any(more.get(name) is not None for name in _OF_SDPA)
    if not (half and plain and query.shape[2] == 1):
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
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
