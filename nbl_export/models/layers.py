"""Find the attention layers and the MLPs of a PyTorch model, by its row in a table or by its structure.

The blocks of a model are one ``ModuleList`` with as many entries as the configuration has layers. The self-attention
of a block is its only direct child with an attention class, its MLP the only one that multiplies by weights and does
not mix tokens. This is true for most families of transformers; ``families.toml`` has a row for each of the others.
Facts that neither the configuration nor the modules give are found by a forward pass (:mod:`.dummy_run`).

A block may mix tokens in another way: by a convolution, a state-space model, linear attention or cross-attention.
Such a block is not a candidate; :attr:`Structure.others` names its kind.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from os.path import commonprefix
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from nbl_export.blocks import MLP, Block, Mlp, layer_of
from nbl_export.errors import InputError
from nbl_export.files import read_table

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
# What a module is given that looks at other tokens than its own.
_OF_OTHERS = frozenset(
    {
        "attention_mask",
        "position_ids",
        "position_embeddings",
        "position_bias",
        "layer_past",
        "cache",
        "cache_params",
    }
    | {"past_key_value", "past_key_values", "seq_idx"}
)
NOT_YET = "this architecture is not supported yet"


@dataclass(frozen=True)
class Family:
    """Where a family has its attention and MLP; None means the common structure. The fields are those of the file."""

    models: tuple[str, ...] = ()
    layers: str | None = None
    attention: str | None = None
    output: str | None = None
    adds: str | None = None
    stream: str | None = None
    mlp: str | None = None
    mlp_output: str | None = None
    mlp_adds: str | None = None
    padding_stands_in: bool = False
    refused: str | None = None


@cache
def _families() -> dict[str, Family]:
    table = read_table(Path(__file__).parent / "families.toml")
    rows = [Family(**{**row, "models": tuple(row["models"])}) for row in table.values()]
    return {model_type: row for row in rows for model_type in row.models}


def family_of(model: torch.nn.Module) -> Family:
    """The row of the family of ``model``, or the common structure."""
    return _families().get(str(getattr(text_config(model), "model_type", "")), Family())


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


def attention_layers(model: torch.nn.Module) -> tuple[AttentionModules, ...]:
    """Every self-attention layer of ``model`` in order; raises the errors of :func:`structure`."""
    return structure(model).layers


def structure(model: torch.nn.Module) -> Structure:
    """Every block of ``model``, classified by how it mixes tokens.

    Raises :class:`InputError` if there is not exactly one stack of blocks, or if the attention of a block is not
    found: such a model is refused before calibration.
    """
    family, name, config = family_of(model), type(model).__name__, text_config(model)
    if family.refused:
        raise InputError(f"{name} is not supported: {family.refused}.")
    stack_path, stack = block_stack(model)
    types = getattr(config, "layer_types", None) or []
    layers, others = [], {}
    for index, block in enumerate(stack.children()):
        declared = str(types[index]) if index < len(types) else "full_attention"
        found = _attentions(family, block)
        if declared not in _SOFTMAX or not found:
            # The token mixer is the first child that is not a norm.
            classes = [type(child).__name__ for child in block.children()]
            mixer = next((kind for kind in classes if "norm" not in kind.lower()), type(block).__name__)
            others[index] = mixer if declared in _SOFTMAX else declared
            continue
        if len(found) != 1 or not has_module(block, found[0]):
            raise InputError(
                f"Layer {index} ({type(block).__name__}) has {len(found)} attention modules where one is expected: "
                f"{NOT_YET}."
            )
        attention = block.get_submodule(found[0])
        if family.adds is None and "residual" in inspect.signature(attention.forward).parameters:
            raise InputError(
                f"The attention of layer {index} ({type(block).__name__}) adds the residual itself, so its output is "
                f"not the attention's alone: {NOT_YET}."
            )
        window = getattr(attention, "sliding_window", None) or getattr(config, "sliding_window", None)
        windowed = SLIDING if window and getattr(config, "use_sliding_window", True) else FULL
        path = f"{stack_path}.{index}"
        layers.append(
            BlockModules(
                index,
                path,
                f"{path}.{found[0]}",
                f"{path}.{family.output or found[0]}",
                family.adds,
                _SOFTMAX[declared] if types else windowed,
                stream=f"{path}.{family.stream}" if family.stream else path,
            )
        )
    kinds = sorted(set(others.values()))
    why = next((f"{kind}, in which {_NEEDS[kind]}" for kind in kinds if kind in _NEEDS), "")
    if why:
        raise InputError(
            f"{name} has layers of {why}; a graph would need that cache as inputs and outputs: {NOT_YET}."
        )
    if not layers:
        raise InputError(
            f"{name} has no attention of a kind that is exported, which are full, windows and chunks: its layers are "
            f"{', '.join(kinds)}."
        )
    return Structure(tuple(layers), others)


def block_stack(model: torch.nn.Module) -> tuple[str, torch.nn.Module]:
    """The stack of blocks of ``model`` and its path; raises :class:`InputError` if there is not exactly one."""
    family, count = family_of(model), layer_count(model)

    def attends(block: torch.nn.Module) -> bool:
        return has_module(block, family.attention) if family.attention else bool(_self_attention(block))

    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == count
        and (name.endswith(family.layers) if family.layers else any(map(attends, module)))
    ]
    if len(stacks) != 1:
        found = f"{len(stacks)} lists" if stacks else "no list"
        raise InputError(
            f"{type(model).__name__} has {found} of its {count} layers in which an attention is known, where one is "
            f"expected: {NOT_YET}."
        )
    return stacks[0]


def has_module(block: torch.nn.Module, path: str) -> bool:
    """Whether ``block`` has a module at the dotted ``path``."""
    return any(name == path for name, _ in block.named_modules())


def _words(block: torch.nn.Module, name: str, child: torch.nn.Module) -> str:
    """The name and the class of a ``child`` without the family's name, with which both classes begin.

    It says nothing: Kimi Linear has softmax attention, and Qwen3MoeAttention is no MLP.
    """
    kind = type(child).__name__
    return f"{name} {kind.removeprefix(commonprefix([type(block).__name__, kind]))}".lower()  # noqa: RUF071


def _self_attention(block: torch.nn.Module) -> list[str]:
    return [
        name
        for name, child in block.named_children()
        if "attention" in type(child).__name__.lower()
        and not any(word in _words(block, name, child) for word in _NO_SELF_ATTENTION)
    ]


def _attentions(family: Family, block: torch.nn.Module) -> list[str]:
    """The paths of the self-attention of ``block``, of which there should be one."""
    return [family.attention] if family.attention else _self_attention(block)


def _is_mlp(child: torch.nn.Module) -> bool:
    """Whether the part ``child`` of a block multiplies each token by weights, by itself and more than once."""
    products = [t for t in (*child.parameters(), *child.buffers()) if t.ndim >= 2]
    return len(products) > 1 and not _OF_OTHERS & set(inspect.signature(child.forward).parameters)


def mlp_modules(model: torch.nn.Module) -> dict[int, BlockModules[Mlp] | str]:
    """Of each layer its MLP, or why it has none that is found; ``stream`` is the MLP itself.

    It is a gated or plain MLP, or a mixture of experts as a whole. Where it is two modules of the block (fc1 and fc2),
    a row of the table names both.
    """
    (path, stack), family = block_stack(model), family_of(model)
    found: dict[int, BlockModules[Mlp] | str] = {}
    for index, block in enumerate(stack.children()):
        attention = {path.partition(".")[0] for path in _attentions(family, block)}
        named = [n for n, child in block.named_children() if n not in attention and _is_mlp(child)]
        one = family.mlp or (named[0] if len(named) == 1 else None)
        if one is None:
            many = f"{len(named)} of its modules are MLPs where one is expected"
            found[index] = many if named else "it has no MLP"
        elif not has_module(block, one):
            found[index] = f"it has no {one}"
        elif not family.mlp and "residual" in inspect.signature(block.get_submodule(one).forward).parameters:
            found[index] = "its MLP adds the residual itself"
        else:
            place, module = f"{path}.{index}", f"{path}.{index}.{one}"
            output = f"{place}.{family.mlp_output or one}"
            found[index] = BlockModules(
                Mlp(index), place, module, output, family.mlp_adds, MLP, stream=module
            )
    return found


def text_config(model: torch.nn.Module) -> Any:
    """The configuration of ``model``, of a multimodal one that of its language model."""
    config: Any = model.config
    return config.get_text_config()


def hidden_size(model: torch.nn.Module) -> int:
    """Width d of the residual stream."""
    return _configured(model, "hidden_size", "width")


def layer_count(model: torch.nn.Module) -> int:
    """Number L of blocks."""
    return _configured(model, "num_hidden_layers", "number of layers")


def _configured(model: torch.nn.Module, key: str, what: str) -> int:
    found = getattr(text_config(model), key, None)
    if not isinstance(found, int):
        raise InputError(
            f"The configuration of {type(model).__name__} has no {key}, one {what} for all its blocks: {NOT_YET}."
        )
    return found


def vocabulary(model: torch.nn.Module) -> int:
    """Number of the tokens that a decoder predicts."""
    return int(text_config(model).vocab_size)


def positions(model: torch.nn.Module) -> int | None:
    """The model's number of positions; None if its configuration has no limit."""
    config = text_config(model)
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not found or int(found) < 0:
        return None
    # Some models start to count positions after the index of the padding token.
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    pads = [int(pad) + 1 for m in tables if (pad := getattr(m, "padding_idx", None)) is not None]
    return int(found) - max(pads, default=0)


def position_rows(model: torch.nn.Module) -> int:
    """The number of positions that each token has: three (time, height, width) with M-RoPE, else one."""
    rope = getattr(text_config(model), "rope_parameters", None) or {}
    return len(_AXES) if rope.get("mrope_section") else 1


def image_shape(model: torch.nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of the images, from the configuration."""
    config = text_config(model)
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


def backbone(model: torch.nn.Module) -> Any:
    """The model without its language-model head, which takes a fifth of a small model's time."""
    return getattr(model, "base_model", model)


def language_head(model: torch.nn.Module) -> Any:
    """The module that makes logits of states; None if ``model`` has none."""
    try:
        return model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def scoring_head(model: torch.nn.Module) -> str | None:
    """The name of the linear layer that scores each token's states, beside a model without a pooler; None without.

    Sequence classification by a decoder takes the scores of the last token.
    """
    body = backbone(model)
    weighted = [
        (n, m) for n, m in model.named_children() if m is not body and any(True for _ in m.parameters())
    ]
    alone = body is not model and len(weighted) == 1 and isinstance(weighted[0][1], torch.nn.Linear)
    return weighted[0][0] if alone else None
