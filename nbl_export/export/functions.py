"""Replacements for functions of a model while it is traced, where the originals cannot be exported or export badly.

Attention   transformers' sdpa repeats keys and values for grouped queries; here they stay grouped. Soft-capped
            scores and attention sinks, which scaled_dot_product_attention does not support, are decomposed.
Experts     transformers loops over the experts that received tokens, which a graph cannot do (:mod:`.experts`).
States      state-space models and linear attention, whose loops would be traced for one length (:mod:`.recurrence`).
Complex     rotary embeddings that multiply complex numbers, for which the exporter has few operators; here they are
            pairs of real numbers.
Erfinv      the inverse of erf, for which ONNX has no operator.
Branches    rotary embeddings that go by the longest row of a batch: `dynamic` frequencies of a text beyond the model's
            positions, and the scale of Phi-3.5-MoE. Both ways are in the graph. (The `longrope` of other models is a
            `where`.) As there, a shorter row has the frequencies of the longest one.

The first two use the interfaces of transformers for this purpose. A model whose attention does not use them is
traced with its own, decomposed.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from nbl_export.errors import InputError
from nbl_export.export.recurrence import use_recurrences
from nbl_export.export.traced_experts import experts, numbered
from nbl_export.models.attention import count_positions, takes_attention
from nbl_export.models.running import replaced

_NAME = "nbl_export"
# What a family hands to its attention where an index has chosen the keys of each query.
_CHOSEN = ("indices", "block_indices")


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention of ``query`` [batch, heads, sequence, head_dim] to grouped keys and values.

    ``attention_mask`` [batch, 1, sequence, total] is True where a query sees a key. ``softcap`` bounds the
    scores, ``s_aux`` [heads] are the scores of the sinks, and ``position_bias`` [batch, heads, sequence, total] is
    added to them. Returns [batch, sequence, heads, head_dim].

    Raises :class:`InputError` where an index has chosen the keys of a query, of which a graph would have all.
    """
    if any(others.get(name) is not None for name in _CHOSEN):
        raise InputError(
            f"{type(module).__name__} has an index with a cache of its own that chooses the keys of each query; a "
            "graph would need that cache as inputs and outputs, and has none: this architecture is not supported yet."
        )
    if attention_mask is None and getattr(module, "is_causal", False) and query.shape[2] > 1:
        # transformers makes no mask for one row in an eager run, and says so by the module.
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        attention_mask = seen.tril(key.shape[2] - query.shape[2])[None, None]
    if position_bias is not None:
        attention_mask = _biased(attention_mask, position_bias)
    if softcap is None and s_aux is None:
        grouped = query.shape[1] != key.shape[1]
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=grouped
        )
    else:
        output = _decomposed(query, key, value, attention_mask, scaling, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


def _biased(mask: torch.Tensor | None, bias: torch.Tensor) -> torch.Tensor:
    """What is added to the scores: the ``bias`` where a query sees a key."""
    if mask is None:
        return bias
    return torch.where(mask, bias, torch.finfo(bias.dtype).min) if mask.dtype == torch.bool else bias + mask


def _decomposed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch, heads, sequence, size = query.shape
    groups = heads // key.shape[1]
    # [batch, KV heads, groups, sequence, head_dim]: each key is multiplied by the queries of its group.
    query = query.reshape(batch, key.shape[1], groups, sequence, size)
    scale = size**-0.5 if scaling is None else scaling
    scores = query @ key[:, :, None].transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask.reshape(batch, -1, groups if mask.shape[1] == heads else 1, *mask.shape[2:])
    if sinks is not None:
        sink = sinks.reshape(1, key.shape[1], groups, 1, 1).expand(batch, -1, -1, sequence, 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights @ value[:, :, None]).reshape(batch, heads, sequence, value.shape[-1])


@contextmanager
def exportable(
    model: Any, mask: Callable[..., torch.Tensor] | None, attend: Callable[..., Any] = attention
) -> Iterator[None]:
    """``model`` with these functions within the block; ``mask`` replaces transformers' mask function.

    ``attend`` is used instead of :func:`attention`.
    """
    count_positions(model)
    with ExitStack() as undo:
        _use_attention(model, mask, attend, undo)
        _use_experts(model, undo)
        for name, function in _MISSING.items():
            undo.enter_context(replaced(torch, name, function))
        code = sys.modules[type(model).__module__]
        for name, made in _INEXACT.items():
            if own := getattr(code, name, None):
                undo.enter_context(replaced(code, name, made(own)))
        use_recurrences(model, undo)
        _use_both_ways(model, undo)
        yield


def _use_attention(
    model: Any, mask: Callable[..., torch.Tensor] | None, attend: Callable[..., Any], undo: ExitStack
) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    before = model.config._attn_implementation
    undo.callback(model.set_attn_implementation, before)
    if takes_attention(model):
        AttentionInterface.register(_NAME, attend)
        AttentionMaskInterface.register(_NAME, mask or sdpa_mask)
        model.set_attn_implementation(_NAME)
        return
    model.set_attn_implementation("eager")  # some models ignore this
    undo.enter_context(replaced(torch.nn.functional, _SDPA.__name__, _broadcasting))
    if mask is not None:
        name = model.config._attn_implementation
        own = ALL_MASK_ATTENTION_FUNCTIONS[name]
        undo.callback(AttentionMaskInterface.register, name, own)
        AttentionMaskInterface.register(name, _additive(mask) if name == "eager" else mask)


_SDPA = torch.nn.functional.scaled_dot_product_attention


def _broadcasting(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PyTorch's attention broadcasts one key head to all queries; for the exporter this must be explicit."""
    return _SDPA(query, key, *args, **{"enable_gqa": query.shape[1] != key.shape[1], **kwargs})


class _Complex:
    """A complex tensor as its real and its imaginary part; reshaping methods apply to both."""

    def __init__(self, real: torch.Tensor, imag: torch.Tensor) -> None:
        self.real, self.imag = real, imag

    def __mul__(self, other: Any) -> _Complex:
        if not isinstance(other, _Complex):
            return _Complex(self.real * other, self.imag * other)
        real = self.real * other.real - self.imag * other.imag
        return _Complex(real, self.real * other.imag + self.imag * other.real)

    def __getitem__(self, index: Any) -> _Complex:
        return _Complex(self.real[index], self.imag[index])

    def __getattr__(self, name: str) -> Any:
        real, imag = getattr(self.real, name), getattr(self.imag, name)
        return (lambda *args: _Complex(real(*args), imag(*args))) if callable(real) else real


def _inverse_erf(y: torch.Tensor) -> torch.Tensor:
    """The inverse of erf, for which there is no operator: an approximation, and Newton's method from there."""
    a = 0.147
    log = torch.log(1 - y * y)
    half = 2 / (math.pi * a) + log / 2
    x = torch.sign(y) * torch.sqrt(torch.sqrt(half * half - log / a) - half)
    for _ in range(3):
        x = x - (torch.erf(x) - y) * torch.exp(x * x) * (math.sqrt(math.pi) / 2)
    return x


_MISSING: Mapping[str, Callable[..., Any]] = {
    "erfinv": _inverse_erf,
    "polar": lambda length, angle: _Complex(length * torch.cos(angle), length * torch.sin(angle)),
    "view_as_complex": lambda x: _Complex(x[..., 0], x[..., 1]),
    "view_as_real": lambda z: torch.stack([z.real, z.imag], dim=-1),
}


def _by_table(own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The buckets of distances from a table: they are rounded logarithms, of which some are whole numbers but for the
    last bit, so that another runtime's logarithm gives another bucket. What is beyond the table is clamped anyway.
    """

    def buckets(relative_pos: torch.Tensor, bucket_size: int, max_position: int) -> torch.Tensor:
        # In a thread of its own, where nothing is traced.
        with ThreadPoolExecutor(1) as apart:
            known = apart.submit(
                lambda: own(torch.arange(max_position + 1), bucket_size, max_position).tolist()
            )
        table = torch.tensor(known.result(), device=relative_pos.device)
        return table[relative_pos.abs().clamp(max=max_position)] * relative_pos.sign()

    return buckets


# Functions of a model's own code, by name.
_INEXACT: Mapping[str, Callable[..., Callable[..., torch.Tensor]]] = {"make_log_bucket_position": _by_table}


def _additive(mask: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def added(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor:
        return torch.where(mask(*args, **kwargs), 0.0, torch.finfo(dtype).min).to(dtype)

    return added


def is_replaced(model: Any) -> bool:
    """Whether everything in ``model`` that is hard to export uses the interfaces, so that these functions are traced.

    A model with its own attention or its own loop over experts, or whose rotary embedding depends on the length of
    the text, must be traced to find out.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
        return False
    return getattr(model, "_supports_attention_backend", False) and experts_are_replaced(model)


def experts_are_replaced(model: Any) -> bool:
    """Whether ``model`` has no experts, or has them by the interface."""
    names = " ".join(type(module).__name__.lower() for module in model.modules())
    mixture = "experts" in names or "moe" in names
    return not mixture or bool(model._can_set_experts_implementation())


def _use_experts(model: Any, undo: ExitStack) -> None:
    if model._can_set_experts_implementation():
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        undo.enter_context(numbered(model))
        ALL_EXPERTS_FUNCTIONS.register(_NAME, experts)
        undo.callback(model.set_experts_implementation, model.config._experts_implementation)
        model.set_experts_implementation(_NAME)


# Rotary embeddings -------------------------------------------------------------------------------


def _use_both_ways(model: torch.nn.Module, undo: ExitStack) -> None:
    """No rotary embedding of ``model`` branches, or is changed by what it computes, until ``undo`` is closed."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds if isinstance(kinds, dict) else {None: kinds}
        if any("dynamic" in str(kind) for kind in kinds.values()):
            vars(module)["forward"] = _dynamic(module, kinds)
        elif "longrope" in kinds.values() and _branches(own := inspect.unwrap(type(module).forward)):
            vars(module)["forward"] = _switching(module, own)
        else:
            continue
        undo.callback(vars(module).pop, "forward")


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
    switch = int(module.config.rope_parameters["original_max_position_embeddings"])

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        longest = torch.max(position_ids) + 1
        ways = []
        for length in (switch, switch + 1):  # of the longest row
            with replaced(torch, "max", lambda _, last=length - 1: last):
                ways.append(own(copy.copy(module), x, position_ids))
        short, long = ways
        return tuple(torch.where(longest > switch, b, a) for a, b in zip(short, long, strict=True))

    return forward
