"""Find the lengths from which on a model computes something else: windows, chunks, rope switches, kept tokens …

A text that is shorter than such a length says nothing about what begins there. They are read from the configuration by
``lengths.toml``; a key of a family that has no row there is found by its name. What crosses them: :func:`crossed_by`,
as far as memory and time allow, and beyond that :func:`small_copy`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nbl_export.batch import PIXELS
from nbl_export.errors import InputError, first_line
from nbl_export.files import read_table
from nbl_export.models.layers import (
    block_stack,
    hidden_size,
    language_head,
    layer_count,
    main_input,
    positions,
    structure,
    text_config,
    vocabulary,
)
from nbl_export.models.running import quiet

# Bytes of the logits of one row, and of the scores of one attention layer.
_BYTES = 1 << 30
# How far the row of a prefill goes beyond a length.
BEYOND = 8
_LARGEST = 1 << 31
# Of a copy: its weights, two gigabytes in float32, and its blocks.
_WEIGHTS, _BLOCKS = 1 << 29, 8
# Its smallest length, and how far each is from the next: each begins apart from the others.
_FIRST, _APART = 16, 6


@dataclass(frozen=True)
class Length:
    """A text longer than ``tokens`` is computed in another way in ``layers``; ``key`` of the configuration says so.

    With ``batch`` the longest row decides for all rows of a batch.
    """

    key: str
    tokens: int
    layers: tuple[int, ...]
    batch: bool = False

    @property
    def name(self) -> str:
        return f"{self.key} {self.tokens:,}"


@cache
def _table(name: str) -> dict[str, Any]:
    return read_table(Path(__file__).parent / name)


def lengths(model: torch.nn.Module) -> tuple[Length, ...]:
    """The lengths of ``model``, in ascending order: each number of tokens once, with the keys that say it.

    A model of images has none: all of them have one size.
    """
    if main_input(model) == PIXELS:
        return ()
    text, every = text_config(model), tuple(range(layer_count(model)))
    entries = list(_entries(text.to_dict()))
    kinds = {layer.index: layer.kind for layer in structure(model).layers}
    found: dict[tuple[int, str], Length] = {}
    for key, value in entries:
        if (row := _row(key, entries)) is None:
            continue
        kind = row.get("kind")
        layers = tuple(i for i, found_kind in kinds.items() if found_kind == kind) if kind else ()
        # Without a layer of its kind a key is idle, unless nothing says which kinds there are.
        if kind and not layers and (len(set(kinds.values())) > 1 or getattr(text, "layer_types", None)):
            continue
        for tokens in {value} if isinstance(value, int) else set(value):
            if 1 < tokens < _LARGEST:
                length = Length(key, tokens, layers or every, row.get("batch", False))
                found.setdefault((tokens, key), length)
    return tuple(sorted(found.values(), key=lambda length: (length.tokens, length.key)))


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every number, list of numbers and text of a configuration by the last part of its key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            if "model_type" not in value:  # another model's
                yield from _entries(value)
        elif isinstance(value, list | tuple):
            numbers = [one for one in value if _is_number(one)]
            if numbers:
                yield str(key), tuple(numbers)
        elif value is not None and value is not False:
            yield str(key), value


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _row(key: str, entries: Sequence[tuple[str, Any]]) -> Mapping[str, Any] | None:
    """The row that makes ``key`` a length in the configuration of these ``entries``."""
    if not all(_is_number(one) or isinstance(one, tuple) for name, one in entries if name == key):
        return None
    net, *every = _table("lengths.toml").values()
    rows = [row for row in every if key in row["keys"]]
    for row in rows:
        needs = row.get("needs", {})
        if not needs or any({one, "*"} & {*needs.get(name, ())} for name, one in entries):
            return row  # type: ignore[no-any-return]
    name = key.lower()
    caught = any(word in name for word in net["words"]) and not any(word in name for word in net["but"])
    return {} if caught and not rows else None


# what crosses them -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossed:
    """The prompts that cross a ``length``: ``prompts`` are their lengths, each a batch of its own, none if ``why``.

    The first prompt is longer than the length, the last one is decoded across it; without decode steps there is only
    the first. Rows are apart because in some models the longest row of a batch decides for the others. ``reached`` is
    false for a length beyond the model's positions, where nothing can begin.
    """

    length: Length
    prompts: tuple[int, ...] = ()
    why: str = ""
    reached: bool = True


class Room(NamedTuple):
    """How long all texts together may be that cross lengths: ``least`` tokens, or what makes ``work`` with the weights.

    ``work`` is weights times tokens of one pass.
    """

    work: float
    least: int = 0


# Of parity: some seconds a pass; as many tokens as every model is run on are always there.
PARITY = Room(5e11, 256)
# Of the rehearsal before an export, which is done twice: half a second. Beyond it a small copy is rehearsed with.
REHEARSAL = Room(2e10)


def crossed_by(
    model: torch.nn.Module, steps: int, given: Sequence[int] = (), passes: int = 1, room: Room = PARITY
) -> tuple[Crossed, ...]:
    """How each length of ``model`` is crossed by prompts that ``steps`` more tokens follow, as far as there is room.

    A length that a prompt of those ``given`` goes beyond needs none for its prefill; ``passes`` counts how often a
    token is computed. The logits of a row and the scores of its attention may take :data:`_BYTES` each.
    """
    found: list[Crossed] = []
    if not (known := lengths(model)):
        return ()
    limit, asked = positions(model) or _LARGEST, set[int]()
    left = max(room.least, int(room.work / sum(p.numel() for p in model.parameters()) / passes))
    width = hidden_size(model) if language_head(model) is None else vocabulary(model)
    heads = int(getattr(text_config(model), "num_attention_heads", None) or 1)
    for length in known:
        tokens = length.tokens
        # A prompt longer than the length unless there is one, and one that the steps carry across it.
        beyond, before = min(tokens + BEYOND, limit - steps), max(1, tokens - steps // 2)
        prompts = (*(() if any(p > tokens + 1 for p in given) else (beyond,)), *((before,) if steps else ()))
        cost = sum(p + steps for p in prompts if p not in asked)
        row = max((*prompts, tokens)) + steps
        if tokens >= limit:
            one = Crossed(length, why=f"the model has {limit:,} positions", reached=False)
        elif beyond <= tokens or before + steps > limit:
            few = f"of the model's {limit:,} positions too few are left beyond it for {steps} decode steps"
            one = Crossed(length, why=few)
        elif cost > left or row * width * 4 > _BYTES or row**2 * heads * 4 > _BYTES:
            one = Crossed(length, why="a text of that length takes too long or too much memory")
        else:
            one = Crossed(length, prompts)
            left -= cost
            asked |= set(prompts)
        found.append(one)
    return tuple(found)


def crossing_prompts(crossed: Sequence[Crossed]) -> list[int]:
    """The prompts of all of them, each once, in ascending order."""
    return sorted({prompt for one in crossed for prompt in one.prompts})


# a small copy -------------------------------------------------------------------------------------


def small_lengths(lengths: Sequence[Length]) -> dict[int, int]:
    """What each number of tokens of ``lengths`` is in the copy, in the same order."""
    every = sorted({length.tokens for length in lengths})
    return {tokens: min(tokens, _FIRST + _APART * i) for i, tokens in enumerate(every)}


def small_copy(model: torch.nn.Module, lengths: Sequence[Length], seed: int = 0) -> torch.nn.Module:
    """A copy of ``model`` with random weights and small ``lengths``, as :func:`small_lengths` says.

    Of each kind of block there is one (of a single kind two), and what only makes a model large is small
    (``small.toml``). A list with an entry for each block keeps those of the blocks that stay, and a list of blocks has
    them by their new places. Raises :class:`InputError` if its code does not build it, or the copy is still large.
    """
    changes = {(length.key, length.tokens): small_lengths(lengths)[length.tokens] for length in lengths}
    chosen = _kinds(model)
    text = text_config(model)
    original: dict[str, Any] = text.to_dict()
    failures: list[Exception] = []
    small = _table("small.toml")
    for attempt in ({**small["sizes"], **small["experts"]}, small["sizes"], {}):
        raw = _changed(original, changes, layer_count(model), chosen, attempt)
        try:
            return _built(getattr(model, "of_config", None) or type(model), type(text), raw, seed)
        except Exception as error:  # a model's own code may raise anything
            failures.append(error)
    said = first_line(failures[0])[:200]
    raise InputError(f"{type(model).__name__} cannot be made smaller ({said}).") from failures[0]


def _built(kind: Any, config: Any, raw: Mapping[str, Any], seed: int) -> torch.nn.Module:
    """Each module matters, and none overflows: matrices have gain 1.5, and biases are not all zero."""
    with quiet():
        with torch.device("meta"):
            size = sum(p.numel() for p in kind(config.from_dict(dict(raw))).parameters())
        if size > _WEIGHTS:
            raise InputError(f"a copy has {size:,} weights")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: torch.nn.Module = kind(config.from_dict(dict(raw))).float().eval().requires_grad_(False)
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    scale = float(parameter.float().std()) or 1.0
                    parameter.mul_(1.5 / (scale * parameter.shape[-1] ** 0.5))
                elif parameter.numel() > 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
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
            if key in _table("small.toml")["layers"]["keys"] and value == count:
                return len(chosen)
            most = sizes.get(key, value)
            return changes.get((key, value), min(value, most) if value > 0 else value)
        return value

    made = {key: one(str(key), value) for key, value in raw.items()}
    if sizes:
        made |= {k: min(v, 1) for k, v in made.items() if str(k).endswith("_token_id") and isinstance(v, int)}
    return made
