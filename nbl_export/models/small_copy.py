"""Make a small copy of a model in which what begins at a length begins early: few blocks, random weights.

Its configuration is the model's with three changes: the lengths are small, of each kind of block there is one (of a
single kind two), and what only makes a model large is small (``small.toml``). A list with an entry for each block keeps
the entries of the blocks that stay, and a list of blocks has them by their new places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nbl_export.errors import InputError, first_line
from nbl_export.files import read_table
from nbl_export.models.layers import block_stack, layer_count, text_config
from nbl_export.models.lengths import Length
from nbl_export.models.libraries import quiet

# Weights of a copy: half a gigabyte in float32.
_WEIGHTS = 1 << 27
_BLOCKS = 8
_HEADS = 4  # where the size of a head is not said, but follows from the width
# The smallest length, and how far each is from the next: each begins apart from the others.
_FIRST, _APART = 16, 6


def small_lengths(lengths: Sequence[Length]) -> dict[int, int]:
    """What each number of tokens of ``lengths`` is in the copy, in the same order."""
    every = sorted({length.tokens for length in lengths})
    return {tokens: min(tokens, _FIRST + _APART * i) for i, tokens in enumerate(every)}


def small_copy(model: torch.nn.Module, lengths: Sequence[Length], seed: int = 0) -> torch.nn.Module:
    """A copy of ``model`` with small ``lengths``, as :func:`small_lengths` says.

    Raises :class:`InputError` if its code does not build it, or the copy is still large.
    """
    changes = {(length.key, length.tokens): small_lengths(lengths)[length.tokens] for length in lengths}
    chosen = _kinds(model)
    text = text_config(model)
    original: dict[str, Any] = text.to_dict()
    failures: list[Exception] = []
    for sizes in _attempts(original):
        raw = _changed(original, changes, layer_count(model), chosen, sizes)
        try:
            return _built(getattr(model, "of_config", type(model)), type(text), raw, seed)
        except Exception as error:  # a model's own code may raise anything
            failures.append(error)
    said = first_line(failures[0])[:200]
    raise InputError(f"{type(model).__name__} cannot be made smaller ({said}).") from failures[0]


def _attempts(config: Mapping[str, Any]) -> list[Mapping[str, int]]:
    """What is made small, most first."""
    sizes, experts, width = (dict(_table()[name]) for name in ("sizes", "experts", "width"))
    heads, size = config.get("num_attention_heads"), config.get("hidden_size")
    if config.get("head_dim") and isinstance(heads, int):
        width = {"hidden_size": heads * -(-width["hidden_size"] // heads)}  # some families ask for a multiple
    elif isinstance(heads, int) and isinstance(size, int) and heads > _HEADS:
        grouped = config.get("num_key_value_heads") not in (None, heads)
        width = {
            "hidden_size": size // heads * _HEADS,
            "num_attention_heads": _HEADS,
            "num_key_value_heads": _HEADS // 2 if grouped else _HEADS,
        }
    if isinstance(size, int):
        for key in _table()["scaled"]["keys"]:
            if isinstance(count := config.get(key), int):
                width[key] = max(1, count * width["hidden_size"] // size)
    return [{**sizes, **experts, **width}, {**sizes, **experts}, sizes, {}]


def _built(kind: Any, config: Any, raw: Mapping[str, Any], seed: int) -> torch.nn.Module:
    made = config.from_dict(dict(raw))
    with quiet():
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(made).parameters())
        if size > _WEIGHTS:
            raise InputError(f"a copy has {size:,} weights")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: torch.nn.Module = kind(config.from_dict(dict(raw))).float().eval().requires_grad_(False)
            _draw(model)
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    block_stack(model)  # which must be found in the copy too
    return model


def _kinds(model: torch.nn.Module) -> list[int]:
    """The blocks that stay: the first of each kind by the configuration's lists and by its modules, at least two."""
    count = layer_count(model)
    lists = [v for v in text_config(model).to_dict().values() if _by_layer(v, count)]
    kinds: dict[Any, int] = {}
    for index, block in enumerate(block_stack(model)[1].children()):
        modules = tuple(sorted({type(m).__name__ for m in block.modules()}))
        kinds.setdefault((modules, *(repr(values[index]) for values in lists)), index)
    chosen = sorted(kinds.values())[:_BLOCKS]
    if len(chosen) == 1 and count > 1:
        chosen.append(next(i for i in range(count) if i not in chosen))
    return sorted(chosen)


def _by_layer(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count > 1


def _of_blocks(key: str, value: Any, count: int) -> bool:
    """Whether a list names blocks by their places, as ``attn_layer_indices``."""
    if "token" in key or not any(word in key for word in ("layer", "idx", "indices")):
        return False
    places = [v for v in value if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < count]
    return bool(value) and list(value) == sorted(set(places))


def _changed(
    raw: Mapping[str, Any],
    changes: Mapping[tuple[str, int], int],
    count: int,
    chosen: Sequence[int],
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    def one(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            if value and all(str(k).isdigit() for k in value):  # by layer
                own = {int(k): v for k, v in value.items()}
                return {new: one(key, own[old]) for new, old in enumerate(chosen) if old in own}
            return {k: one(str(k), v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            if _of_blocks(key, value, count):
                return [new for new, old in enumerate(chosen) if old in value]
            kept = [value[i] for i in chosen] if _by_layer(value, count) else list(value)
            return [one(key, v) for v in kept]
        if isinstance(value, int) and not isinstance(value, bool):
            if key in _table()["layers"]["keys"] and value == count:
                return len(chosen)
            most = sizes.get(key, value)
            return changes.get((key, value), min(value, most) if value > 0 else value)
        return value

    made = {key: one(str(key), value) for key, value in raw.items()}
    if sizes:
        made |= {k: min(v, 1) for k, v in made.items() if str(k).endswith("_token_id") and isinstance(v, int)}
    return made


@torch.no_grad()
def _draw(model: torch.nn.Module) -> None:
    """Weights with which each module matters, and none overflows: of gain 1.5, and biases that are not all zero."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            scale = float(parameter.float().std()) or 1.0
            parameter.mul_(1.5 / (scale * parameter.shape[-1] ** 0.5))
        elif parameter.numel() > 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)


@cache
def _table() -> dict[str, Any]:
    return read_table(Path(__file__).parent / "small.toml")
