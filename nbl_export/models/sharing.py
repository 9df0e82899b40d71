"""Layers that attend to the keys and values of another layer, found by what their attention functions are given.

Such a layer borrows: it has queries of its own, and no entry in the KV cache. Gemma 3n and Gemma 4 have them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nbl_export.models.attending import attending_by, takes_attention

if TYPE_CHECKING:
    import torch

    from nbl_export.models.layers import AttentionModules

_NAME = "nbl_export_watched"


def shared_keys(model: Any, layers: Sequence[AttentionModules], run: Callable[[], object]) -> dict[int, int]:
    """The layer whose keys each borrowing layer of ``model`` attends to, in the forward pass that ``run`` makes.

    Empty for a model whose attention does not use transformers' interface.
    """
    if not takes_attention(model):
        return {}
    indices = {model.get_submodule(layer.module): layer.index for layer in layers}
    owners: list[tuple[torch.Tensor, int]] = []
    found: dict[int, int] = {}

    def watch(module: Any, keys: torch.Tensor) -> None:
        if module not in indices:
            return
        lender = next((index for seen, index in owners if seen is keys), None)
        if lender is None:
            owners.append((keys, indices[module]))
        else:
            found[indices[module]] = lender

    with _watched(model, watch):
        run()
    return found


@contextmanager
def _watched(model: Any, watch: Callable[[Any, torch.Tensor], None]) -> Iterator[None]:
    """Within the block, ``watch`` is called with each attention module and the keys that its function is given."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module: Any, query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        watch(module, key)
        kwargs.pop("softcap", None)  # sdpa has none; what is computed does not matter
        return sdpa_attention_forward(module, query, key, *args, **kwargs)

    with attending_by(model, _NAME, attend):
        yield
