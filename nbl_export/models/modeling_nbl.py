"""A model of transformers with linear layers in the place of attentions and MLPs (Neural Block Linearization).

This file lies in the folder of a model that `nbl-export convert --to hf` has written, with the classes of that model at
its end, and needs torch and transformers alone. In nbl-export it is a module of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

FILE = "modeling_nbl.py"


class LinearBlock(torch.nn.Module):
    """W u + b in the place of an attention or an MLP, or zeros in the place of one that was left out.

    ``returns`` is the length of the tuple that the original returns, None for a bare tensor. It keeps no cache.
    """

    def __init__(self, width: int, linear: bool, returns: int | None) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width) if linear else None
        self.returns = returns

    def forward(self, hidden_states: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
        y = torch.zeros_like(hidden_states) if self.linear is None else self.linear(hidden_states)
        return y if self.returns is None else (y, *[None] * (self.returns - 1))


class Linearized:
    """Goes before the class of a causal language model, whose ``config.nbl`` says what becomes of which module.

    ``config.nbl`` has ``modules``, by dotted path ``linear`` and ``returns`` of :class:`LinearBlock`, and the name of
    an ``attention`` in its layer. The attentions that are left are numbered one after the other, so that a KV cache has
    them alone, and its first entry is one of them.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        model: Any = self
        for path, place in config.nbl["modules"].items():
            parent, _, name = path.rpartition(".")
            block = LinearBlock(config.hidden_size, place["linear"], place["returns"])
            setattr(model.get_submodule(parent), name, block)
        kept = (
            module
            for path, module in model.named_modules()
            if path.rpartition(".")[2] == config.nbl["attention"] and not isinstance(module, LinearBlock)
        )
        for number, module in enumerate(kept):
            module.layer_idx = number

    @classmethod
    def source(cls) -> str:
        """The text of this file with the classes of the model at its end."""
        return Path(__file__).read_text(encoding="utf-8")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As of any model, with this file."""
        found = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        (Path(save_directory) / FILE).write_text(self.source(), encoding="utf-8")
        return found
