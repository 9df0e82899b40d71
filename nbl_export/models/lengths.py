"""Find the lengths from which on a model computes something else: windows, chunks, rope switches, kept tokens …

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


@cache
def _table() -> tuple[Mapping[str, list[str]], tuple[_Row, ...]]:
    """The net that catches names, and the rows."""
    table = read_table(Path(__file__).parent / "lengths.toml")
    net = table.pop("net")
    return net, tuple(_Row(**{**row, "keys": tuple(row["keys"])}) for row in table.values())


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
        row = _row(key, entries)
        if row is None:
            continue
        layers = tuple(i for i, kind in kinds.items() if kind == row.kind) if row.kind else ()
        # Without a layer of its kind a key is idle, unless nothing says which kinds there are.
        if row.kind and not layers and (len(set(kinds.values())) > 1 or getattr(text, "layer_types", None)):
            continue
        for tokens in {value} if isinstance(value, int) else set(value):
            if 1 < tokens < _LARGEST:
                found.setdefault((tokens, key), Length(key, tokens, layers or every, row.batch))
    known = {tokens for tokens, _ in found}
    for name, tokens in _of_modules(model):
        # What the configuration says too is known, or idle; so is what it derives from a longer one, as a radius.
        short = name.rpartition(".")[2]
        derived = getattr(text, short, None) in (tokens, tokens - 1) and any(tokens <= t + 1 for t in known)
        if tokens not in known and (short, tokens) not in entries and not derived:
            found.setdefault((tokens, name), Length(name, tokens, every, configured=False))
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


def _row(key: str, entries: Sequence[tuple[str, Any]]) -> _Row | None:
    """The row that makes ``key`` a length in the configuration of these ``entries``."""
    if not all(_is_number(one) or isinstance(one, tuple) for name, one in entries if name == key):
        return None
    rows = [row for row in _table()[1] if key in row.keys]
    for row in rows:
        needs = row.needs or {}
        if not needs or any(
            one in needs.get(name, ()) or "*" in needs.get(name, ()) for name, one in entries
        ):
            return row
    return _Row((key,)) if not rows and _caught(key) else None


def _caught(key: str) -> bool:
    net, name = _table()[0], key.lower()
    return any(w in name for w in net["words"]) and not any(w in name for w in net["but"])


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
    found: list[tuple[str, Any]] = []
    for name, function in vars(kind).items() if not kind.__module__.startswith("torch.") else ():
        plain = getattr(function, "__func__", function)
        if inspect.isfunction(plain) and name != "__init__":  # which keeps what it takes
            given = inspect.signature(plain).parameters.values()
            found += [(f"{name}.{p.name}", p.default) for p in given if _is_number(p.default)]
    return tuple(found)


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
    width = hidden_size(model) if language_head(model) is None else vocabulary(model)
    heads = int(getattr(text_config(model), "num_attention_heads", None) or 1)
    for length in known:
        tokens = length.tokens
        if limit is not None and tokens >= limit:
            found.append(Crossed(length, why=f"the model has {limit:,} positions", reached=False))
            continue
        # A prompt longer than the length unless there is one, and one that the steps carry across it.
        beyond = tokens + BEYOND if limit is None else min(tokens + BEYOND, limit - steps)
        before = max(1, tokens - steps // 2)
        if beyond <= tokens or (limit is not None and before + steps > limit):
            few = f"of the model's {limit:,} positions too few are left beyond it for {steps} decode steps"
            found.append(Crossed(length, why=few))
            continue
        prompts = (*(() if any(p > tokens + 1 for p in given) else (beyond,)), *((before,) if steps else ()))
        cost = sum(p + steps for p in prompts if p not in asked)
        row = max((*prompts, tokens)) + steps
        if cost > left or row * width * 4 > _BYTES or row**2 * heads * 4 > _BYTES:
            found.append(Crossed(length, why="a text of that length takes too long or too much memory"))
            continue
        left -= cost
        asked |= set(prompts)
        found.append(Crossed(length, prompts))
    return tuple(found)


def crossing_prompts(crossed: Sequence[Crossed]) -> list[int]:
    """The prompts of all of them, each once, in ascending order."""
    return sorted({prompt for one in crossed for prompt in one.prompts})
