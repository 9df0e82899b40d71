"""Where the attention layers of a PyTorch decoder are, found from its structure.

A decoder keeps its blocks in one ``ModuleList`` as long as the configuration's layer count; the
attention of a block is its one direct child whose class is an attention class. That holds for the
decoder families of transformers, so nothing here is keyed on ``model_type``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbl_export.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention layer: its position in the stack and the dotted paths of its modules."""

    index: int
    block: str
    attention: str


def attention_layers(model: torch.nn.Module) -> tuple[AttentionLayer, ...]:
    """Every self-attention layer of ``model`` in order.

    Raises :class:`InputError` if there is no such stack of blocks, or a block without exactly one
    attention: such a model is refused before calibration.
    """
    stack_path, stack = _block_stack(model)
    layers = []
    for index, block in enumerate(stack.children()):
        names = [
            name for name, child in block.named_children() if "attention" in type(child).__name__.lower()
        ]
        if len(names) != 1:
            raise InputError(
                f"Layer {index} ({type(block).__name__}) has {len(names)} attention modules where one is expected: "
                "this architecture is not served yet."
            )
        if "residual" in inspect.signature(getattr(block, names[0]).forward).parameters:
            raise InputError(
                f"The attention of layer {index} ({type(block).__name__}) adds the residual itself, so its output is "
                "not the attention's alone: this architecture is not served yet."
            )
        path = f"{stack_path}.{index}"
        layers.append(AttentionLayer(index, path, f"{path}.{names[0]}"))
    return tuple(layers)


def check_served(model: torch.nn.Module) -> None:
    """Refuse, before any work, a model whose structure is not served or that is not causal.

    Causality is tried out: logits must not change when a later token does.
    """
    import torch

    attention_layers(model)
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None].repeat(2, 1) % 4 + 1
    ids[1, -1] = 0
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    if not torch.allclose(logits[0], logits[1], rtol=1e-3, atol=1e-3):
        raise InputError(
            f"{type(model).__name__} is not causal (an earlier token's logits depend on a later token): only "
            "decoder-only language models are served."
        )


def hidden_size(model: torch.nn.Module) -> int:
    """Width d of the residual stream."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def layer_count(model: torch.nn.Module) -> int:
    """Number L of blocks, which is also the number of KV-cache entries of the original model."""
    config: Any = model.config
    return int(config.get_text_config().num_hidden_layers)


def positions(model: torch.nn.Module) -> int | None:
    """The longest context the model has positions for; None if its configuration sets no bound."""
    config: Any = model.config
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(found) if found else None


def _block_stack(model: torch.nn.Module) -> tuple[str, torch.nn.Module]:
    import torch

    count = layer_count(model)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == count
        and any("attention" in type(child).__name__.lower() for child in module[0].children())
    ]
    if len(stacks) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(stacks)} stacks of {count} blocks with attention where one is "
            "expected: this architecture is not served yet."
        )
    return stacks[0]


Observer = Callable[[int, "torch.Tensor", "torch.Tensor", "torch.Tensor"], None]


@contextmanager
def observed(
    model: torch.nn.Module, layers: tuple[AttentionLayer, ...], observer: Observer
) -> Iterator[None]:
    """Call ``observer(index, residual, normed, output)`` for each attention layer of each forward pass.

    ``residual`` is the block's input h, ``normed`` what the attention reads, ``output`` what it
    writes, before the residual addition; each [batch, sequence, d], views of the live activations.
    """
    with ExitStack() as hooks:
        for layer in layers:
            for handle in _observe(model, layer, observer):
                hooks.callback(handle.remove)
        yield


def _observe(model: torch.nn.Module, layer: AttentionLayer, observer: Observer) -> list[Any]:
    seen: dict[str, torch.Tensor] = {}

    def block_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["residual"] = hidden_states(args, kwargs)

    def attention_input(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["normed"] = hidden_states(args, kwargs)

    def attention_output(_module: Any, _args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        observer(layer.index, seen.pop("residual"), seen.pop("normed"), y)

    block, attention = model.get_submodule(layer.block), model.get_submodule(layer.attention)
    return [
        block.register_forward_pre_hook(block_input, with_kwargs=True),
        attention.register_forward_pre_hook(attention_input, with_kwargs=True),
        attention.register_forward_hook(attention_output),
    ]


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The activations argument of a block's or an attention's ``forward``."""
    value: torch.Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return value
