"""The positions of each row's tokens, for attention that counts places in the cache instead.

Llama 4 scales the queries of some layers by ``arange(tokens) + cache.get_seq_length(layer)``: one number for all rows
of a batch. It is a row's position only where no row is padded and the cache grows. Here what is added to the places
gives the positions that the model itself is given, so that every row is computed as it would be alone, with any cache
or none.

Where attention reads the length of the cache is found in its source; other models are left as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from nbl_export.models.compat import CACHE_ARGUMENTS

_POSITIONS, _PLACES = "position_ids", "cache_position"
# What the source of such attention says, of transformers 5 and of 4, which hands over the places themselves.
_READS = (("get_seq_length", "arange"), (_PLACES, "floor"))
# What may be computed of a position; all of it is elementwise.
_OPERATORS = frozenset(
    ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "pow")
)
_ELEMENTWISE = _OPERATORS | {"div", "float", "to", "type_as", "floor", "log1p", "log", "exp", "sqrt", "clamp"}


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
    return any(all(word in source for word in words) for words in _READS)


def _with_positions(_block: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if not isinstance(kwargs.get(_POSITIONS), torch.Tensor):
        return None
    if _PLACES in kwargs:
        return args, {**kwargs, _PLACES: _Rows(kwargs[_POSITIONS])}
    name = next((name for name in CACHE_ARGUMENTS if name in kwargs), None)
    return name and (args, {**kwargs, name: _Counting(kwargs[name], kwargs[_POSITIONS])})


class _Counting:
    """A cache, or none, whose length stands for the positions of what comes next."""

    def __init__(self, of_model: Any, positions: torch.Tensor) -> None:
        self._of_model, self._positions = of_model, positions

    def get_seq_length(self, *_: Any) -> _Before:
        return _Before(self._positions)

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._of_model is None:
            return keys, values
        return self._of_model.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of_model, name)


class _Before:
    """The number of tokens before those of a pass: added to 0, 1, 2 … it is their positions."""

    def __init__(self, positions: torch.Tensor) -> None:
        self._positions = positions

    def __add__(self, places: torch.Tensor) -> _Rows:
        assert places.ndim == 1
        return _Rows(self._positions)

    __radd__ = __add__

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), _kwargs: Any = None) -> Any:
        if _name(function) not in ("add", "radd"):
            return NotImplemented
        first, second = args
        return second + first if isinstance(second, cls) else first + second


class _Rows:
    """Numbers [batch, sequence] where a model has numbers [sequence], which it makes [1, sequence, …] to use them."""

    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _name(function) not in _ELEMENTWISE:
            return NotImplemented
        return cls(function(*(a._values if isinstance(a, cls) else a for a in args), **(kwargs or {})))

    def view(self, *shape: Any) -> torch.Tensor:
        first, *rest = shape[0] if len(shape) == 1 else shape
        assert first == 1
        return self._values.view(self._values.shape[0], *rest)

    reshape = view

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in _ELEMENTWISE:
            raise AttributeError(name)
        return lambda *args, **kwargs: _Rows(getattr(self._values, name)(*args, **kwargs))


def _operator(name: str) -> Callable[[_Rows, Any], _Rows]:
    return lambda self, other: _Rows(getattr(self._values, name)(other))


for _operation in _OPERATORS:
    setattr(_Rows, f"__{_operation}__", _operator(f"__{_operation}__"))


def _name(function: Any) -> str:
    return str(function.__name__).strip("_")
