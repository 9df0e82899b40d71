"""Find the attention layers of a PyTorch model, by its row in a table or by its structure.

The blocks of a model are one ``ModuleList`` with as many entries as the configuration has layers. The self-attention
of a block is its only direct child with an attention class. This is true for most families of transformers;
``families.toml`` has a row for each of the others. Facts that neither the configuration nor the modules give are
found by a forward pass (:mod:`.dummy_run`).

A block may mix tokens in another way: by a convolution, a state-space model, linear attention or cross-attention.
Such a block is not a candidate; :attr:`Structure.others` names its kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nbl_export.blocks import Block, Mlp, layer_of, part_of
from nbl_export.errors import InputError
from nbl_export.models.families import Family, family_of

if TYPE_CHECKING:
    import torch

B = TypeVar("B", bound=Block)
FULL, SLIDING = "full", "sliding window"
# The names of softmax attention layers in configurations, and their display names.
_SOFTMAX = {
    "full_attention": FULL,
    "attention": FULL,
    "sliding_attention": SLIDING,
    "chunked_attention": "chunks",
    # Attention beside a state-space model in one block.
    "hybrid": FULL,
    "hybrid_sliding": SLIDING,
}
# What a graph would need for layers of other names, in which the keys that a query sees follow from the text.
_CHOSEN = "an index with a cache of its own chooses the keys of each query"
_BLOCKS = "keys are compressed in blocks, and an index with a cache of its own may choose among them"
_NEEDS = {
    "indexed_attention": _CHOSEN,
    "minimax_m3_sparse": _CHOSEN,
    "compressed_sparse_attention": _BLOCKS,
    "heavily_compressed_attention": _BLOCKS,
}
_AXES = ("time", "height", "width")
_NO_SELF_ATTENTION = ("cross", "encoder", "linear", "lightning", "delta", "mamba")


@dataclass(frozen=True)
class BlockModules(Generic[B]):
    """One attention or MLP: which it is (``index``), and the dotted paths of its modules.

    ``block`` is the layer, ``module`` reads u. ``output`` is the module that writes y, ``module`` itself by default;
    ``adds`` names the argument that the module adds to y. ``kind`` is full or the kind of its window, or mlp. The input
    of ``stream`` is the residual stream h.
    """

    index: B
    block: str
    module: str
    output: str
    adds: str | None = None
    kind: str = FULL
    stream: str = field(kw_only=True)

    @property
    def named(self) -> str:
        """For a sentence."""
        return f"the {'MLP' if isinstance(self.index, Mlp) else 'attention'} of layer {layer_of(self.index)}"


AttentionModules = BlockModules[int]


@dataclass(frozen=True)
class Structure:
    """The self-attention layers of a model, and the kind of each other block by index."""

    layers: tuple[AttentionModules, ...]
    others: Mapping[int, str]

    def as_json(self) -> dict[str, Any]:
        """The number of blocks, and the kind of each by its index as text."""
        return {
            "blocks": len(self.layers) + len(self.others),
            "kinds": {str(layer.index): layer.kind for layer in self.layers},
            "others": {str(index): what for index, what in self.others.items()},
        }


def attention_layers(model: torch.nn.Module) -> tuple[AttentionModules, ...]:
    """Every self-attention layer of ``model`` in order; raises the errors of :func:`structure`."""
    return structure(model).layers


def plain_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """The plain attributes of a module that a model may read, as `attention_type`; a replacement needs them too."""
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and not callable(v)}


def structure(model: torch.nn.Module) -> Structure:
    """Every block of ``model``, classified by how it mixes tokens.

    Raises :class:`InputError` if there is not exactly one stack of blocks, or if the attention of a block is not
    found: such a model is refused before calibration.
    """
    family = family_of(model_type(model))
    if family.refused:
        raise InputError(f"{type(model).__name__} is not supported: {family.refused}.")
    stack_path, stack = block_stack(model)
    layers, others = [], {}
    for index, block in enumerate(stack.children()):
        declared = _declared_kind(model, index)
        found = [family.attention] if family.attention else _self_attention(block)
        if declared not in _SOFTMAX or not found:
            others[index] = declared if declared not in _SOFTMAX else _mixer(block)
            continue
        if len(found) != 1 or not has_module(block, found[0]):
            raise InputError(
                f"Layer {index} ({type(block).__name__}) has {len(found)} attention modules where one is expected: "
                "this architecture is not supported yet."
            )
        attention = block.get_submodule(found[0])
        if family.adds is None and "residual" in inspect.signature(attention.forward).parameters:
            raise InputError(
                f"The attention of layer {index} ({type(block).__name__}) adds the residual itself, so its output is "
                "not the attention's alone: this architecture is not supported yet."
            )
        path = f"{stack_path}.{index}"
        output = family.output or found[0]
        kind = _kind(model, attention, declared)
        layers.append(
            BlockModules(
                index,
                path,
                f"{path}.{found[0]}",
                f"{path}.{output}",
                family.adds,
                kind,
                stream=f"{path}.{family.stream}" if family.stream else path,
            )
        )
    kinds = sorted(set(others.values()))
    why = next((f"{kind}, in which {_NEEDS[kind]}" for kind in kinds if kind in _NEEDS), "")
    if why:
        raise InputError(
            f"{type(model).__name__} has layers of {why}; a graph would need that cache as inputs and outputs, and has "
            "none: this architecture is not supported yet."
        )
    if not layers:
        raise InputError(
            f"{type(model).__name__} has no attention of a kind that is exported, which are full, windows and chunks: "
            f"its layers are {', '.join(kinds)}."
        )
    return Structure(tuple(layers), others)


def has_module(block: torch.nn.Module, path: str) -> bool:
    """Whether ``block`` has a module at the dotted ``path``."""
    return any(name == path for name, _ in block.named_modules())


def _self_attention(block: torch.nn.Module) -> list[str]:
    # The family's name, with which both classes begin, says nothing: Kimi Linear has softmax attention.
    own = type(block).__name__
    kinds = {name: type(child).__name__ for name, child in block.named_children()}
    return [
        name
        for name, kind in kinds.items()
        if _is_self_attention(name, kind, commonprefix([own, kind]))  # noqa: RUF071  of names, not of paths
    ]


def _is_self_attention(name: str, kind: str, family: str) -> bool:
    words = f"{name} {kind.removeprefix(family)}".lower()
    return "attention" in kind.lower() and not any(w in words for w in _NO_SELF_ATTENTION)


def _mixer(block: torch.nn.Module) -> str:
    """The class of the token mixer of a block without self-attention: its first child that is not a norm."""
    for child in block.children():
        if "norm" not in (name := type(child).__name__).lower():
            return name
    return type(block).__name__


def _declared_kind(model: torch.nn.Module, index: int) -> str:
    types = getattr(_config(model), "layer_types", None) or []
    return str(types[index]) if index < len(types) else "full_attention"


def _kind(model: torch.nn.Module, attention: torch.nn.Module, declared: str) -> str:
    config = _config(model)
    if getattr(config, "layer_types", None):
        return _SOFTMAX[declared]
    window = getattr(attention, "sliding_window", None) or getattr(config, "sliding_window", None)
    return SLIDING if window and getattr(config, "use_sliding_window", True) else FULL


def _config(model: torch.nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def model_type(model: torch.nn.Module) -> str:
    """The family's name in the configuration."""
    return str(getattr(_config(model), "model_type", ""))


def hidden_size(model: torch.nn.Module) -> int:
    """Width d of the residual stream."""
    return _configured(model, "hidden_size", "width")


def vocabulary(model: torch.nn.Module) -> int:
    """Number of the tokens that a decoder predicts."""
    return int(_config(model).vocab_size)


def layer_count(model: torch.nn.Module) -> int:
    """Number L of blocks."""
    return _configured(model, "num_hidden_layers", "number of layers")


def _configured(model: torch.nn.Module, key: str, what: str) -> int:
    found = getattr(_config(model), key, None)
    if not isinstance(found, int):
        raise InputError(
            f"The configuration of {type(model).__name__} has no {key}, one {what} for all its blocks: this "
            "architecture is not supported yet."
        )
    return found


def positions(model: torch.nn.Module) -> int | None:
    """The model's number of positions; None if its configuration has no limit."""
    config = _config(model)
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not found or int(found) < 0:
        return None
    # Some models start to count positions after the index of the padding token.
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    pads = [int(pad) + 1 for m in tables if (pad := getattr(m, "padding_idx", None)) is not None]
    return int(found) - max(pads, default=0)


def position_rows(model: torch.nn.Module) -> int:
    """The number of positions that each token has: three (time, height, width) with M-RoPE, else one."""
    rope = getattr(_config(model), "rope_parameters", None) or {}
    return len(_AXES) if rope.get("mrope_section") else 1


def image_shape(model: torch.nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images, from the configuration."""
    config = _config(model)
    size = getattr(config, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(getattr(config, "num_channels", 3)), int(height), int(width)


def main_input(model: torch.nn.Module) -> str:
    """The name of the model's main input: input_ids, pixel_values …"""
    return str(getattr(model, "main_input_name", "input_ids"))


def has_per_layer(body: Any) -> bool:
    """Whether the language model ``body`` is given embeddings of each layer beside those of its tokens."""
    config = getattr(body, "config", None)
    return hasattr(body, "get_per_layer_inputs") and bool(getattr(config, "hidden_size_per_layer_input", 0))


def accepts(model: torch.nn.Module, argument: str) -> bool:
    """Whether the forward function of ``model`` has an argument with that name."""
    return argument in inspect.signature(model.forward).parameters


def accepted_arguments(model: torch.nn.Module, **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that the forward function of ``model`` has: not every family takes positions."""
    return {name: value for name, value in arguments.items() if accepts(model, name)}


def backbone(model: torch.nn.Module) -> Any:
    """The model without its language-model head, which takes a fifth of a small model's time."""
    return getattr(model, "base_model", model)


def scoring_head(model: torch.nn.Module) -> str | None:
    """The name of the linear layer that scores each token's states, beside a model without a pooler; None without.

    Sequence classification by a decoder takes the scores of the last token.
    """
    import torch

    body = backbone(model)
    weighted = [
        name
        for name, child in model.named_children()
        if child is not body and any(True for _ in child.parameters())
    ]
    if body is model or len(weighted) != 1:
        return None
    return weighted[0] if isinstance(getattr(model, weighted[0]), torch.nn.Linear) else None


def block_stack(model: torch.nn.Module) -> tuple[str, torch.nn.Module]:
    """The stack of blocks of ``model`` and its path; raises :class:`InputError` if there is not exactly one."""
    import torch

    family = family_of(model_type(model))
    count = layer_count(model)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == count
        and (name.endswith(family.layers) if family.layers else _mixes_tokens(module, family))
    ]
    if not stacks:
        raise InputError(
            f"{type(model).__name__} has no list of its {count} layers in which an attention is known: this "
            "architecture is not supported yet."
        )
    if len(stacks) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(stacks)} stacks of {count} blocks with attention where one is "
            "expected: this architecture is not supported yet."
        )
    return stacks[0]


def _mixes_tokens(stack: torch.nn.Module, family: Family) -> bool:
    if family.attention:
        return any(has_module(block, family.attention) for block in stack.children())
    return any(_self_attention(block) for block in stack.children())


Observer = Callable[[B, "torch.Tensor", "torch.Tensor", "torch.Tensor"], None]


@contextmanager
def observed(
    model: torch.nn.Module, layers: Sequence[BlockModules[B]], observer: Observer[B]
) -> Iterator[None]:
    """Call ``observer(index, residual, normed, output)`` for each of these blocks in each forward pass.

    ``residual`` is the stream h, ``normed`` the input of the module, ``output`` its output before the residual
    addition; each is [batch, sequence, d], a view of the live activations.
    """
    with ExitStack() as hooks:
        for layer in layers:
            for handle in _observe(model, layer, observer):
                hooks.callback(handle.remove)
        yield


def _observe(model: torch.nn.Module, layer: BlockModules[B], observer: Observer[B]) -> list[Any]:
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def take(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = hidden_states(args, kwargs)

        return take

    def in_rows(tensor: torch.Tensor) -> torch.Tensor:
        # Some families have all tokens in one list while they compute an MLP.
        return tensor.reshape(seen["block"].shape) if getattr(tensor, "ndim", None) == 2 else tensor

    def attention_output(_module: Any, _args: Any, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        if "normed" not in seen:
            raise InputError(
                f"{type(model).__name__} does not run {layer.named} as it is, but replaces it "
                "at run time: this architecture is not supported yet."
            )
        if "residual" not in seen:
            raise InputError(
                f"Layer {layer_of(layer.index)} of {type(model).__name__} does not run its block, its "
                f"{part_of(layer.index)} and the projection of its output once each in this order: this architecture "
                "is not supported yet."
            )
        observer(layer.index, in_rows(seen.pop("residual")), in_rows(seen.pop("normed")), in_rows(y))

    read = {"block": layer.block, "residual": layer.stream, "normed": layer.module}
    hooks: list[Any] = [model.get_submodule(layer.output).register_forward_hook(attention_output)]
    for name, path in read.items():
        hooks.append(model.get_submodule(path).register_forward_pre_hook(keep(name), with_kwargs=True))
    return hooks


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states in the arguments of the ``forward`` of a block or an attention."""
    value: torch.Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return value
