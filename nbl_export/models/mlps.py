"""Find the MLP of each layer of a PyTorch model, by its row in ``families.toml`` or by its structure.

A layer whose MLP is not found keeps it; its attention is a candidate all the same.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from os.path import commonprefix
from typing import TYPE_CHECKING

from nbl_export.models.layers import block_stack, family_of, has_module

if TYPE_CHECKING:
    import torch

# Words in the class or the name of a module that computes each token by itself.
_MLP_WORDS = ("mlp", "feedforward", "feed_forward", "ffn", "moe", "expert")


@dataclass(frozen=True)
class MlpPaths:
    """Dotted paths: of the module that reads u, and of the one that writes y; ``adds`` as in the table of families."""

    module: str
    output: str
    adds: str | None = None


def mlp_paths(model: torch.nn.Module) -> dict[int, MlpPaths | str]:
    """Of each layer its MLP, or why it has none that is found.

    It is the one direct child of the block that multiplies by weights and does not mix tokens: a gated or plain MLP, or
    a mixture of experts as a whole. Where it is two modules of the block (fc1 and fc2), a row of the table names both.
    """
    (path, stack), family = block_stack(model), family_of(model)
    found: dict[int, MlpPaths | str] = {}
    for index, block in enumerate(stack.children()):
        named = [name for name, child in block.named_children() if _is_mlp(block, name, child)]
        one = family.mlp or (named[0] if len(named) == 1 else None)
        if one is None:
            found[index] = (
                f"{len(named)} of its modules are MLPs where one is expected" if named else "it has no MLP"
            )
        elif not has_module(block, one):
            found[index] = f"it has no {one}"
        elif not family.mlp and "residual" in inspect.signature(block.get_submodule(one).forward).parameters:
            found[index] = "its MLP adds the residual itself"
        else:
            inside = f"{path}.{index}."
            found[index] = MlpPaths(inside + one, inside + (family.mlp_output or one), family.mlp_adds)
    return found


def _is_mlp(block: torch.nn.Module, name: str, module: torch.nn.Module) -> bool:
    kind = type(module).__name__
    own = kind.removeprefix(commonprefix([type(block).__name__, kind]))  # noqa: RUF071  Qwen3Moe in Qwen3MoeAttention
    weighted = any(tensor.ndim >= 2 for tensor in (*module.parameters(), *module.buffers()))
    named = any(word in f"{name} {own}".lower() for word in _MLP_WORDS)
    return weighted and named and "norm" not in kind.lower()
