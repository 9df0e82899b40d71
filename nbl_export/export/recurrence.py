"""Replacements for the functions of layers that keep a state, while a model is traced: one graph for any length.

transformers computes a state-space model or a linear attention in chunks for a text and token by token afterwards. Its
loops over chunks are unrolled by a tracer, for one length only. All these layers are one recurrence over tokens:

    S_t = decay_t · S_{t-1} + k_t ⊗ u_t        y_t = q_tᵀ S_t
    u_t = v_t, or for a delta rule beta_t (v_t - k_tᵀ decay_t · S_{t-1})

Here each of these functions prepares q, k, v, decay and beta for all tokens at once, and the recurrence itself is one
operator, which becomes a Scan: over chunks of tokens where a head decays as a whole (:mod:`.chunks`), over tokens where
each value of a key decays by itself (:mod:`.scans`). It begins with the state of the cache and leaves the new one, so a
prefill, a decode step and several tokens after a cache are the same graph.

A padded token changes nothing: neither a state nor what a convolution has seen last, wherever the padding is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from nbl_export.models.forward import StateLayer
from nbl_export.models.running import replaced

# Operators that torch.export cannot express are emitted in a private domain and renamed afterwards. Otherwise the
# exporter would use opset 24 for the full graph, where it decomposes norms and rotary embeddings.
SYMBOLIC_DOMAIN = "nbl_export"
RECURRENCE, CHUNKED = "Recurrence", "ChunkedRecurrence"
# The logarithm of a decay that is nothing in float32, whatever it is multiplied by.
_NOTHING = -1e4


# Of the current forward pass: ``real`` [batch, sequence] is 1 for a token and 0 for padding; ``layer`` is the cache
# layer that was updated last.
_CURRENT: list[Any] = []


@contextmanager
def rows_of(attention_mask: torch.Tensor, tokens: torch.Tensor) -> Iterator[None]:
    """Within the block, these are the rows that a model is run on.

    The mask [batch, total] covers a cache, too; ``tokens`` are [batch, sequence], or their embeddings.
    """
    mask = attention_mask[:, -tokens.shape[1] :]
    # A single token is never padding, but with padding on the right its column of the mask may be another row's.
    single = torch.ones_like(mask).sum(dim=1, keepdim=True) == 1
    _CURRENT.append(SimpleNamespace(real=torch.where(single, 1, mask), layer=None))
    try:
        yield
    finally:
        _CURRENT.pop()


def real_tokens(*_args: Any, **_kwargs: Any) -> torch.Tensor:
    """[batch, sequence]: transformers' mask function for these layers."""
    real: torch.Tensor = _CURRENT[-1].real
    return real


class GraphStates(StateLayer):
    """A cache layer of which a state is an input of the graph, and the state after the last token an output."""

    def __init__(self, shapes: Any, states: Any, past_length: Any) -> None:
        super().__init__(shapes, states, past_length=None)  # it has states also after 0 tokens
        self.past_length = past_length
        self.record_past = True  # a convolution then has one way for any number of tokens

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        rows, state = _CURRENT[-1], self.conv_states[state_idx]
        rows.layer = self
        tokens, of_rows = conv_states.shape[-1], rows.real.shape[1]
        if isinstance(tokens, int) and (isinstance(of_rows, torch.SymInt) or tokens != of_rows):
            seen = torch.cat([state, conv_states], dim=-1)  # the last tokens only, by the model's own choice
            self.conv_states[state_idx] = seen[..., tokens:]
            return seen
        seen = torch.cat([state, conv_states * rows.real[:, None].to(conv_states.dtype)], dim=-1)
        count = torch.cumsum(torch.ones_like(rows.real), dim=1)
        last = torch.amax(count * rows.real, dim=1)  # the tokens up to a row's last real one
        kept = last[:, None] + torch.arange(state.shape[-1])
        self.conv_states[state_idx] = seen.gather(2, kept[:, None].expand(-1, seen.shape[1], -1))
        return seen

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


# The recurrence ----------------------------------------------------------------------------------


def recurrence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    state: torch.Tensor | None,
    beta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [batch, sequence, heads, v] and the state after the last token [batch, heads, k, v], in float32.

    ``query`` and ``key`` are [batch, sequence, heads or 1, k], ``value`` [batch, sequence, heads, v], ``decay``
    [batch, sequence, heads, k or 1], the logarithm of a factor up to 1. ``beta`` [batch, sequence, heads] is that of a
    delta rule. Without a ``state`` it begins with zeros.
    """
    query, key, value, decay = (tensor.float() for tensor in (query, key, value, decay))
    batch, sequence, heads, size = value.shape
    if state is None:
        state = value.new_zeros(batch, heads, key.shape[-1], size)
    state = state.float()
    real = _CURRENT[-1].real.bool()[:, :, None]
    decay = torch.where(real[..., None], torch.clamp(decay, min=_NOTHING), 0.0)
    if beta is None:
        value = torch.where(real[..., None], value, 0.0)
    else:
        beta = torch.where(real, beta.float(), 0.0)
    exporting = torch.compiler.is_exporting()
    if exporting and decay.shape[-1] == 1 and query.shape[2] == heads:
        inputs = [state, decay.squeeze(-1), query, key, value]
        return _operator(CHUNKED, [*inputs, *([] if beta is None else [beta])], value.shape)
    inputs = [state, torch.exp(decay)[..., None], query[..., None, :], key[..., None], value[..., None, :]]
    inputs += [] if beta is None else [beta[..., None, None]]
    if not exporting:
        result, state = _eager(*inputs)
    else:
        result, state = _operator(RECURRENCE, inputs, (batch, sequence, heads, 1, size))
    return result.squeeze(-2), state


def _operator(name: str, inputs: list[torch.Tensor], shape: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What stands for a recurrence in a trace: y in ``shape``, and the state after it."""
    result, state = torch.onnx.ops.symbolic_multi_out(
        f"{SYMBOLIC_DOMAIN}::{name}", inputs, dtypes=[torch.float32] * 2, shapes=[shape, inputs[0].shape]
    )
    return result, state


def _eager(state: torch.Tensor, *tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = []
    for decay, query, key, value, *beta in zip(*(tensor.unbind(1) for tensor in tokens), strict=True):
        state = state * decay
        if beta:
            value = (value - key.transpose(-1, -2) @ state) * beta[0]
        state = state + key * value
        found.append(query @ state)
    return torch.stack(found, dim=1), state


# Functions of transformers ------------------------------------------------------------------------


def state_space(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = 0,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """Mamba-2, with the arguments of transformers' function: ``hidden_states`` [batch, sequence, heads, head_dim]."""
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    dt = torch.clamp(dt, *dt_limit).float()
    heads = hidden_states.shape[2]
    key, query = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (B, C))
    result, state = recurrence(
        query,
        key,
        hidden_states.float() * dt[..., None],
        (A.float() * dt)[..., None],
        None if initial_states is None else initial_states.transpose(-1, -2),
    )
    if D is not None:
        result = result + hidden_states.float() * D[..., None]
    return (result, state.transpose(-1, -2)) if return_final_states else result


def selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """Mamba-1, with the arguments of transformers' function: ``hidden_states`` and ``dt`` [batch, channels, sequence].

    Its state is taken from the cache layer that was updated last, since it is not an argument.
    """
    dt = dt if delta_bias is None else dt + delta_bias[..., None]
    dt = (torch.nn.functional.softplus(dt) if delta_softplus else dt).transpose(1, 2).float()
    layer = _CURRENT[-1].layer if return_last_state else None
    result, state = recurrence(
        C.transpose(1, 2)[:, :, None],
        B.transpose(1, 2)[:, :, None],
        (dt * hidden_states.transpose(1, 2))[..., None],
        dt[..., None] * A,
        None if layer is None else layer.recurrent_states[0][..., None],
    )
    found = result.squeeze(-1).transpose(1, 2)
    found = found if D is None else found + hidden_states * D[:, None]
    found = found if z is None else found * torch.nn.functional.silu(z)
    return (found, state.squeeze(-1)) if return_last_state else found


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    chunk_size: int = 0,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule, with the arguments of transformers' functions.

    ``g`` is the logarithm of the decay, [batch, sequence, heads], or with a last dimension for each value of a key.
    """
    groups = value.shape[2] // key.shape[2]
    query, key = (t.repeat_interleave(groups, dim=2).float() for t in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (t * torch.rsqrt((t * t).sum(dim=-1, keepdim=True) + 1e-6) for t in (query, key))
    result, state = recurrence(
        query * query.shape[-1] ** -0.5,
        key,
        value,
        g if g.ndim == 4 else g[..., None],
        initial_state,
        beta,
    )
    return result.to(value.dtype), state if output_final_state else None


def lightning_attention(
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: torch.Tensor | None = None,
    cache: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MiniMax's linear attention of ``hidden_states`` [batch, sequence, d], as its module computes it."""
    batch, sequence, _width = hidden_states.shape
    heads, size = module.num_attention_heads, module.head_dim
    projected = module.act_fn(module.qkv_proj(hidden_states)).reshape(batch, sequence, heads, 3 * size)
    query, key, value = torch.split(projected, size, dim=3)
    decay = -module.slope_rate[:, 0].expand(batch, sequence, -1, -1)
    before = None if cache is None else cache.get_linear_cache(module.layer_idx)
    result, state = recurrence(query, key, value, decay, before)
    if cache is not None:
        cache.set_linear_cache(module.layer_idx, state)
    mixed = module.norm(result.reshape(batch, sequence, heads * size).to(hidden_states.dtype))
    return module.out_proj(torch.sigmoid(module.output_gate(hidden_states)) * mixed), state


# By their names in transformers' model files.
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "create_recurrent_attention_mask": real_tokens,
    "mamba2_chunk_scan": state_space,
    "mamba_selective_scan": selective_scan,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
}
_FORWARDS: Mapping[str, Callable[..., Any]] = {"MiniMaxLightningAttention": lightning_attention}


def use_recurrences(model: torch.nn.Module, undo: ExitStack) -> None:
    """Replace these functions in the files that ``model`` is made of until ``undo`` is closed."""
    classes = {type(module) for module in model.modules()}
    for file in {sys.modules[found.__module__] for found in classes}:
        for name, function in _FUNCTIONS.items():
            if hasattr(file, name):
                undo.enter_context(replaced(file, name, function))
    for found in classes:
        if found.__name__ in _FORWARDS:
            undo.enter_context(replaced(found, "forward", _FORWARDS[found.__name__]))
