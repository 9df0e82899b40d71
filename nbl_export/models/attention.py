"""Replace or watch a model's attention through transformers' interface, and its count of positions in each row.

*Sharing*: a layer may attend to the keys and values of another one. It borrows: it has queries of its own, and no entry
in the KV cache. Gemma 3n and Gemma 4 have such layers.

*Positions*: Llama 4 scales the queries of some layers by ``arange(tokens) + cache.get_seq_length(layer)``: one number
for all rows of a batch, which is a row's position only where no row is padded and the cache grows. Here what is added
to the places gives the positions that the model itself is given, so that every row is computed as it would be alone.
Where attention reads the length of the cache is found in its source; other models are left as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from nbl_export.models.libraries import CACHE_ARGUMENTS

if TYPE_CHECKING:
    from nbl_export.models.layers import AttentionModules

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


def shared_keys(model: Any, layers: Sequence[AttentionModules], run: Callable[[], object]) -> dict[int, int]:
    """The layer whose keys each borrowing layer of ``model`` attends to, in the forward pass that ``run`` makes.

    Empty for a model whose attention does not use transformers' interface.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

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
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    with attending_by(model, "nbl_export_watched", attend):
        run()
    return found


# positions ----------------------------------------------------------------------------------------


def count_positions(model: torch.nn.Module) -> None:
    """Have the attention of ``model`` count each row's positions wherever it would count places in the cache."""
    kinds = {kind for kind in {type(module) for module in model.modules()} if _counts_places(kind)}
    for block in model.modules() if kinds else ():
        counting = any(type(child) in kinds for child in block.children())
        if counting and _with_positions not in block._forward_pre_hooks.values():
            block.register_forward_pre_hook(_with_positions, with_kwargs=True)


def _counts_places(kind: Any) -> bool:
    if "attention" not in kind.__name__.lower():
        return False
    try:
        source = inspect.getsource(inspect.unwrap(kind.forward))
    except (OSError, TypeError):  # code without a file
        return False
    return "get_seq_length" in source and "arange" in source


def _with_positions(_block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    positions = kwargs.get("position_ids")
    name = next((name for name in CACHE_ARGUMENTS if name in kwargs), None)
    if name is None or not isinstance(positions, torch.Tensor):
        return None
    return args, {**kwargs, name: _Counting(kwargs[name], positions)}


class _Counting:
    """A cache, or none, whose length stands for the positions of what comes next."""

    def __init__(self, of_model: Any, positions: torch.Tensor) -> None:
        self._of_model, self._positions = of_model, positions

    def get_seq_length(self, *_: Any) -> _Rows:
        return _Rows(self._positions, before=True)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (
            (keys, values) if self._of_model is None else self._of_model.update(keys, values, *args, **kwargs)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of_model, name)


class _Rows:
    """Numbers [batch, sequence] where a model has numbers [sequence], which it makes [1, sequence, …] to use them.

    ``before`` is true for the number of tokens before those of a pass: added to 0, 1, 2 … it is their positions.
    """

    def __init__(self, values: torch.Tensor, before: bool = False) -> None:
        self._values, self._before = values, before

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(a, cls) and a._before for a in args):
            (rows,) = (a for a in args if isinstance(a, cls))
            return cls(rows._values) if function.__name__.strip("_") in ("add", "radd") else NotImplemented
        return cls(function(*(a._values if isinstance(a, cls) else a for a in args), **(kwargs or {})))

    def view(self, *shape: Any) -> torch.Tensor:
        first, *rest = shape[0] if len(shape) == 1 else shape
        if first != 1:
            raise NotImplementedError(f"a view of the positions as {shape}")
        return self._values.view(self._values.shape[0], *rest)

    reshape = view

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: _Rows(getattr(self._values, name)(*args, **kwargs))


def _operator(name: str) -> Callable[..., _Rows]:
    def operate(self: _Rows, other: Any) -> _Rows:
        return _Rows(self._values if self._before else getattr(self._values, name)(other))

    return operate


# What may be computed of a position; all of it is elementwise.
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "pow"):
    setattr(_Rows, f"__{_name}__", _operator(f"__{_name}__"))
