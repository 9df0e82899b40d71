"""Find the MLP of each layer of a PyTorch model, by its row in ``families.toml`` or by its structure.

The MLP of a layer is the one direct child of the block that multiplies by weights and does not mix tokens: a gated or
plain MLP, or a mixture of experts as a whole. Where it is two modules of the block (fc1 and fc2), a row names both. A
layer whose MLP is not found keeps it; its attention is a candidate all the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nbl_export.models.families import family_of
from nbl_export.models.layers import block_stack, has_module, hidden_states, model_type

if TYPE_CHECKING:
    import torch

# Words in the class or the name of a module that computes each token by itself.
_WORDS = ("mlp", "feedforward", "feed_forward", "ffn", "moe", "expert")


@dataclass(frozen=True)
class MlpPaths:
    """Dotted paths: of the module that reads u, and of the one that writes y; ``adds`` as in the table of families."""

    module: str
    output: str
    adds: str | None = None


def mlp_paths(model: torch.nn.Module) -> dict[int, MlpPaths | str]:
    """Of each layer its MLP, or why it has none that is found."""
    path, stack = block_stack(model)
    return {
        index: found if isinstance(found := _of(block, model), str) else _within(found, f"{path}.{index}")
        for index, block in enumerate(stack.children())
    }


def _within(found: MlpPaths, block: str) -> MlpPaths:
    return MlpPaths(f"{block}.{found.module}", f"{block}.{found.output}", found.adds)


def _of(block: torch.nn.Module, model: torch.nn.Module) -> MlpPaths | str:
    family = family_of(model_type(model))
    if family.mlp:
        if not has_module(block, family.mlp):
            return f"it has no {family.mlp}"
        return MlpPaths(family.mlp, family.mlp_output or family.mlp, family.mlp_adds)
    named = [name for name, child in block.named_children() if _is_mlp(name, child)]
    if len(named) != 1:
        return f"{len(named)} of its modules are MLPs where one is expected" if named else "it has no MLP"
    if "residual" in inspect.signature(block.get_submodule(named[0]).forward).parameters:
        return "its MLP adds the residual itself"
    return MlpPaths(named[0], named[0])


def _is_mlp(name: str, module: torch.nn.Module) -> bool:
    words = f"{name} {type(module).__name__}".lower()
    weighted = any(tensor.ndim >= 2 for tensor in (*module.parameters(), *module.buffers()))
    return weighted and "norm" not in type(module).__name__.lower() and any(word in words for word in _WORDS)


class WatchedMlps:
    """Finds, in a run, what each MLP reads and writes: ``streams`` and ``odd`` are by layer."""

    def __init__(self, model: torch.nn.Module, paths: Mapping[int, MlpPaths], stack: str) -> None:
        self._model, self._paths, self._stack = model, paths, stack
        self.streams: dict[int, str] = {}
        self.odd: dict[int, str] = {}
        self._normed: dict[str, torch.Tensor] = {}
        self._rows: torch.Size | None = None

    def watch(self, hooks: ExitStack) -> None:
        """Look at a run until ``hooks`` is closed."""
        for index, paths in self._paths.items():
            block = f"{self._stack}.{index}"
            whole = self._model.get_submodule(block)
            hooks.callback(whole.register_forward_pre_hook(self._begin, with_kwargs=True).remove)
            for name, child in whole.named_children():
                if "norm" in f"{name} {type(child).__name__}".lower():
                    norm = partial(self._norm, path=f"{block}.{name}")
                    hooks.callback(child.register_forward_hook(norm).remove)
            module, output = (self._model.get_submodule(p) for p in (paths.module, paths.output))
            read, written = partial(self._read, index=index), partial(self._written, index=index)
            hooks.callback(module.register_forward_pre_hook(read, with_kwargs=True).remove)
            hooks.callback(output.register_forward_hook(written).remove)

    def _begin(self, _block: Any, args: Any, kwargs: Any) -> None:
        given = args or "hidden_states" in kwargs
        self._rows = getattr(hidden_states(args, kwargs), "shape", None) if given else None

    def _norm(self, _module: Any, _args: Any, output: Any, path: str) -> None:
        self._normed[path] = output

    def _read(self, _module: Any, args: Any, kwargs: Any, index: int) -> None:
        import torch

        if not args and "hidden_states" not in kwargs:
            self.odd[index] = "it takes no hidden_states"
            return
        u = hidden_states(args, kwargs)
        # As it is, or with all tokens of the rows in one list.
        usual = isinstance(u, torch.Tensor) and (
            u.ndim == 3 or (self._rows is not None and u.shape == (self._rows[:-1].numel(), self._rows[-1]))
        )
        if not usual or index in self.streams:
            self.odd[index] = "it is run more than once, or not on [rows, tokens, width]"
            return
        same = [
            path
            for path, normed in self._normed.items()
            if isinstance(normed, torch.Tensor) and normed.shape == u.shape and torch.equal(normed, u)
        ]
        self.streams[index] = same[-1] if same else self._paths[index].module
        self._shape = u.shape

    def _written(self, _module: Any, _args: Any, output: Any, index: int) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if getattr(y, "shape", None) != getattr(self, "_shape", None):
            self.odd.setdefault(index, "it does not return what it was given, [rows, tokens, width]")
