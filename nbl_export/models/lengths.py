"""The lengths from which on a model computes something else: windows, chunks, rope switches, tokens that are kept …

A text that is shorter than such a length says nothing about what begins there. They are read from the configuration by
``lengths.toml``, and from the numbers that the modules keep, or their functions take, by their names, so a family that
has no row there is found too. What crosses them: :func:`crossed_by`, as far as memory and time allow.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.batch.names import PIXELS
from nbl_export.datafile import read_table
from nbl_export.models.layers import (
    block_stack,
    hidden_size,
    layer_count,
    main_input,
    positions,
    structure,
    vocabulary,
)

if TYPE_CHECKING:
    import torch

# Bytes of the logits of one row, and of the scores of one attention layer.
_BYTES = 1 << 30
# How far the row of a prefill goes beyond a length.
BEYOND = 8
_LARGEST = 1 << 31


@dataclass(frozen=True)
class Length:
    """A text longer than ``tokens`` is computed in another way in ``layers``; ``key`` of the configuration says so.

    With ``batch`` the longest row decides for all rows of a batch. A number of a module, which no key says, has the
    module's class before its name: such a length cannot be made smaller by a configuration.
    """

    key: str
    tokens: int
    layers: tuple[int, ...]
    batch: bool = False
    configured: bool = True

    @property
    def name(self) -> str:
        return f"{self.key} {self.tokens:,}"


@dataclass(frozen=True)
class _Row:
    keys: tuple[str, ...]
    kind: str | None = None
    needs: Mapping[str, Sequence[Any]] | None = None
    batch: bool = False


def lengths(model: torch.nn.Module) -> tuple[Length, ...]:
    """The lengths of ``model``, in ascending order: each number of tokens once, with the keys that say it.

    A model of images has none: all of them have one size.
    """
    if main_input(model) == PIXELS:
        return ()
    config: Any = model.config
    text = config.get_text_config()
    entries = list(_entries(text.to_dict()))
    kinds = {layer.index: layer.kind for layer in structure(model).layers}
    found: dict[tuple[int, str], Length] = {}
    for key, value in entries:
        row = _row(key, entries)
        if row is None:
            continue
        layers = tuple(i for i, kind in kinds.items() if kind == row.kind) if row.kind else ()
        if row.kind and not layers and len(set(kinds.values())) > 1:
            continue
        if row.kind and not layers and _says_kinds(config):
            continue
        concerned = layers or tuple(range(layer_count(model)))
        for tokens in {value} if isinstance(value, int) else set(value):
            if 1 < tokens < _LARGEST:
                found.setdefault((tokens, key), Length(key, tokens, concerned, row.batch))
    known = {tokens for tokens, _ in found}
    for name, tokens in _of_modules(model):
        # What the configuration says too is known, or idle; so is what it derives from a longer one, as a radius.
        short = name.rpartition(".")[2]
        derived = getattr(text, short, None) in (tokens, tokens - 1) and any(tokens <= t + 1 for t in known)
        if tokens not in known and (short, tokens) not in entries and not derived:
            every = tuple(range(layer_count(model)))
            found.setdefault((tokens, name), Length(name, tokens, every, configured=False))
    return tuple(sorted(found.values(), key=lambda length: (length.tokens, length.key)))


def _says_kinds(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "layer_types", None))


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


def _row(key: str, entries: Sequence[tuple[str, Any]]) -> _Row | None:
    """The row that makes ``key`` a length in the configuration of these ``entries``."""
    value = [one for name, one in entries if name == key]
    if not all(_is_number(one) or isinstance(one, tuple) for one in value):
        return None
    rows = [row for row in _rows() if key in row.keys]
    for row in rows:
        if row.needs is None or any(
            name in row.needs and (one in row.needs[name] or "*" in row.needs[name]) for name, one in entries
        ):
            return row
    return _Row((key,)) if not rows and _caught(key) else None


def _caught(key: str) -> bool:
    words = _net()
    name = key.lower()
    return any(w in name for w in words["words"]) and not any(w in name for w in words["but"])


def _of_modules(model: torch.nn.Module) -> Iterator[tuple[str, int]]:
    """Numbers that modules keep, or their functions take, under names that the net catches, for lengths that no
    configuration says.
    """
    path, stack = block_stack(model)
    above = [model.get_submodule(path[:end]) for end in (0, *(i for i, c in enumerate(path) if c == "."))]
    for module in (*above, *stack.modules()):
        kind: Any = type(module)
        for name, value in (*vars(module).items(), *_defaults(kind)):
            short = name.rpartition(".")[2]
            if not short.startswith("_") and _is_number(value) and 1 < value < _LARGEST and _caught(short):
                yield f"{kind.__name__}.{name}", value


@cache
def _defaults(kind: type) -> tuple[tuple[str, Any], ...]:
    """What the functions of a class of a model's code take if they are given nothing else."""
    if kind.__module__.startswith("torch."):
        return ()
    found = []
    for name, function in vars(kind).items():
        plain = getattr(function, "__func__", function)
        if inspect.isfunction(plain) and name != "__init__":  # which keeps what it takes
            given = inspect.signature(plain).parameters.values()
            found += [(f"{name}.{p.name}", p.default) for p in given if _is_number(p.default)]
    return tuple(found)


@cache
def _table() -> dict[str, Any]:
    return read_table(Path(__file__).parent / "lengths.toml")


def _net() -> Mapping[str, list[str]]:
    net: Mapping[str, list[str]] = _table()["net"]
    return net


@cache
def _rows() -> tuple[_Row, ...]:
    rows = [row for name, row in _table().items() if name != "net"]
    return tuple(_Row(**{**row, "keys": tuple(row["keys"])}) for row in rows)


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


@dataclass(frozen=True)
class Room:
    """How long all texts together may be that cross lengths: ``least`` tokens, or what makes ``work`` with the weights.

    ``work`` is weights times tokens of one pass.
    """

    work: float
    least: int = 0

    def tokens(self, model: torch.nn.Module, passes: int) -> int:
        """Tokens of which each is computed ``passes`` times."""
        weights = sum(p.numel() for p in model.parameters())
        return max(self.least, int(self.work / weights / passes))


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
    limit, left, asked = positions(model), room.tokens(model, passes), set[int]()
    for length in known:
        tokens = length.tokens
        if limit is not None and tokens >= limit:
            found.append(Crossed(length, why=f"the model has {limit:,} positions", reached=False))
            continue
        prompts = _prompts(tokens, steps, given, limit)
        if prompts is None:
            few = f"of the model's {limit:,} positions too few are left beyond it for {steps} decode steps"
            found.append(Crossed(length, why=few))
            continue
        cost = sum(p + steps for p in prompts if p not in asked)
        row = max((*prompts, tokens)) + steps
        if cost > left or row * _width(model) * 4 > _BYTES or row**2 * _heads(model) * 4 > _BYTES:
            found.append(Crossed(length, why="a text of that length takes too long or too much memory"))
            continue
        left -= cost
        asked |= set(prompts)
        found.append(Crossed(length, prompts))
    return tuple(found)


def _prompts(tokens: int, steps: int, given: Sequence[int], limit: int | None) -> tuple[int, ...] | None:
    """A prompt longer than ``tokens`` unless there is one, and one that the steps carry across; None without room."""
    beyond = tokens + BEYOND if limit is None else min(tokens + BEYOND, limit - steps)
    before = max(1, tokens - steps // 2)
    if beyond <= tokens or (limit is not None and before + steps > limit):
        return None
    decoded = (before,) if steps else ()
    return decoded if any(p > tokens + 1 for p in given) else (beyond, *decoded)


def _width(model: torch.nn.Module) -> int:
    """Numbers that a graph of ``model`` gives for each token."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return hidden_size(model) if head is None else vocabulary(model)


def _heads(model: torch.nn.Module) -> int:
    config: Any = model.config
    return int(getattr(config.get_text_config(), "num_attention_heads", None) or 1)


def crossing_prompts(crossed: Sequence[Crossed]) -> list[int]:
    """The prompts of all of them, each once, in ascending order."""
    return sorted({prompt for one in crossed for prompt in one.prompts})
