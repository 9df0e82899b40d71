"""What a model's own functions are replaced by while it is traced, where those cannot be exported or export badly.

Attention   transformers' own sdpa repeats keys and values for grouped queries; here they stay grouped. Soft-capped
            scores and attention sinks, which scaled_dot_product_attention cannot express, are written out.
Experts     transformers' own loops over the experts that were hit, which a graph cannot; here every expert takes
            the tokens that were sent to it, none or many.
Complex     rotary embeddings that multiply complex numbers, of which the exporter knows few operators; here they are
            pairs of real ones.

The first two go through the interfaces that transformers has for this. A model whose attention does not is traced
with its own, written out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from nbl_export.models.compat import growing_mask

_NAME = "nbl_export"
# What `torch.export` cannot express is emitted under a name of our own and renamed afterwards: the
# exporter would otherwise take the whole graph to opset 24, where it decomposes norms and rotary embeddings.
SYMBOLIC_DOMAIN = "nbl_export"


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention of ``query`` [batch, heads, sequence, size] to grouped keys and values.

    ``attention_mask`` [batch, 1, sequence, total] is True where a query sees a key. ``softcap`` bounds the
    scores, ``s_aux`` [heads] are the scores of sinks. Returns [batch, sequence, heads, size].
    """
    if softcap is None and s_aux is None:
        grouped = query.shape[1] != key.shape[1]
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=grouped
        )
    else:
        output = _written_out(query, key, value, attention_mask, scaling, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


def _written_out(
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
    # [batch, KV heads, groups, sequence, size]: each key meets the queries of its group.
    query = query.reshape(batch, key.shape[1], groups, sequence, size)
    scale = size**-0.5 if scaling is None else scaling
    scores = query @ key[:, :, None].transpose(-1, -2) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    if sinks is not None:
        sink = sinks.reshape(1, key.shape[1], groups, 1, 1).expand(batch, -1, -1, sequence, 1)
        scores = torch.cat([scores, sink.to(scores.dtype)], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights @ value[:, :, None]).reshape(batch, heads, sequence, value.shape[-1])


def experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Σ over the experts each token [tokens, d] was sent to, weighted: ``top_k_index``, ``_weights`` [tokens, k]."""
    result = torch.zeros_like(hidden_states)
    up, up_bias = ("gate_up_proj", "gate_up_proj_bias") if module.has_gate else ("up_proj", "up_proj_bias")
    tokens = hidden_states.shape[0]
    for expert in range(module.num_experts):
        # How many tokens an expert gets is known only when the graph runs. torch.export would reason about every
        # such number for minutes; told that all may come, it need not, and no shape of it stays in the graph.
        sent = _onnx("NonZero", [top_k_index == expert], torch.long, (2, tokens))
        token = _onnx("Gather", [sent, torch.tensor(0)], torch.long, (tokens,), axis=0)
        places = sent.T
        inner = _rows(hidden_states, token)
        inner = _project(module, up, up_bias, expert, inner)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        output = _project(module, "down_proj", "down_proj_bias", expert, inner)
        if module.has_post_expert_norm:
            output = module.post_expert_norm(output)
        weight = _onnx("GatherND", [top_k_weights, places], top_k_weights.dtype, (tokens,))
        output = _rows(result, token) + (output * weight[:, None]).to(result.dtype)
        # A token goes to an expert at most once, so there is nothing to add up here.
        result = _onnx("ScatterND", [result, token[:, None], output], result.dtype, result.shape)
    return result


_EAGER: Mapping[str, Callable[..., torch.Tensor]] = {
    "NonZero": lambda mask: torch.nonzero(mask).T,
    "Gather": lambda values, index: values[index],
    "GatherND": lambda values, places: values[tuple(places.T)],
    "ScatterND": lambda values, index, new: values.index_put((index[:, 0],), new),
}


def _rows(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return _onnx("Gather", [values, index], values.dtype, values.shape, axis=0)


def _onnx(
    op: str, inputs: list[torch.Tensor], dtype: torch.dtype, shape: Any, **attributes: Any
) -> torch.Tensor:
    """A standard ONNX operator as it is; ``shape`` is what torch.export takes its result to be."""
    if not torch.compiler.is_exporting():  # a rehearsal, not a trace
        return _EAGER[op](*inputs)
    made: torch.Tensor = torch.onnx.ops.symbolic(
        f"{SYMBOLIC_DOMAIN}::{op}", inputs, attributes, dtype=dtype, shape=shape
    )
    return made


def _project(module: Any, name: str, bias: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    weight: torch.Tensor = getattr(module, name)[expert]
    y = x @ (weight if module.is_transposed else weight.T)
    return y + getattr(module, bias)[expert] if module.has_bias else y


@contextmanager
def exportable(
    model: Any, mask: Callable[..., torch.Tensor] | None, attend: Callable[..., Any] = attention
) -> Iterator[None]:
    """``model`` with these functions for the length of the block; ``mask`` replaces transformers' own.

    ``attend`` takes the place of :func:`attention`.
    """
    with ExitStack() as undo:
        _use_attention(model, mask, attend, undo)
        _use_experts(model, undo)
        for name, function in _COMPLEX.items():
            undo.enter_context(_replaced(torch, name, function))
        yield


def _use_attention(
    model: Any, mask: Callable[..., torch.Tensor] | None, attend: Callable[..., Any], undo: ExitStack
) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    before = model.config._attn_implementation
    undo.callback(model.set_attn_implementation, before)
    if getattr(model, "_supports_attention_backend", False):
        AttentionInterface.register(_NAME, attend)
        AttentionMaskInterface.register(_NAME, mask or growing_mask())
        model.set_attn_implementation(_NAME)
        return
    model.set_attn_implementation("eager")  # some keep theirs all the same
    undo.enter_context(_replaced(torch.nn.functional, _SDPA.__name__, _broadcasting))
    if mask is not None:
        name = model.config._attn_implementation
        own = ALL_MASK_ATTENTION_FUNCTIONS[name]
        undo.callback(AttentionMaskInterface.register, name, own)
        AttentionMaskInterface.register(name, _additive(mask) if name == "eager" else mask)


@contextmanager
def _replaced(module: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


_SDPA = torch.nn.functional.scaled_dot_product_attention


def _broadcasting(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PyTorch's attention takes one key head for all queries as it is; the exporter must be told so."""
    return _SDPA(query, key, *args, **{"enable_gqa": query.shape[1] != key.shape[1], **kwargs})


class _Complex:
    """A tensor of complex numbers as its real and its imaginary part; what reshapes it, reshapes both."""

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


_COMPLEX: Mapping[str, Callable[..., Any]] = {
    "polar": lambda length, angle: _Complex(length * torch.cos(angle), length * torch.sin(angle)),
    "view_as_complex": lambda x: _Complex(x[..., 0], x[..., 1]),
    "view_as_real": lambda z: torch.stack([z.real, z.imag], dim=-1),
}


def _additive(mask: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def added(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> torch.Tensor:
        return torch.where(mask(*args, **kwargs), 0.0, torch.finfo(dtype).min).to(dtype)

    return added


def is_replaced(model: Any) -> bool:
    """Whether all of ``model`` that is hard to export goes through the interfaces, so that these functions are traced.

    A model that has its own attention, loops over its own experts, or rotates by the length of its text is one
    nobody knows until it is traced.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", rope.get("type")) in ("longrope", "dynamic"):
        return False
    names = " ".join(type(module).__name__.lower() for module in model.modules())
    mixture = "experts" in names or "moe" in names
    return getattr(model, "_supports_attention_backend", False) and (not mixture or _has_experts(model))


def _has_experts(model: Any) -> bool:
    # Before transformers 5 there is no such interface.
    return bool(getattr(model, "_can_set_experts_implementation", lambda: False)())


def _use_experts(model: Any, undo: ExitStack) -> None:
    if _has_experts(model):
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(_NAME, experts)
        undo.callback(model.set_experts_implementation, model.config._experts_implementation)
        model.set_experts_implementation(_NAME)
