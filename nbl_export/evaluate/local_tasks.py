"""Local tasks: .jsonl files of rows, checked row by row, sampled, and told by their fields how to be asked."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nbl_export.calibrate.text import BROKEN_ARCHIVE, open_packed
from nbl_export.datafile import read_table
from nbl_export.errors import InputError
from nbl_export.files import sha256_of_json

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_LETTERS = 26
# Examples are drawn from this many rows that are not asked; more would only fill the cache's key.
_POOL = 64

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """One table of shapes.toml: which fields a row has, how it is asked, and which metric's recovery is stated."""

    name: str
    fields: tuple[str, ...]
    task: Mapping[str, Any]
    scored: str
    chance: str
    blank: str | None = None


@dataclass(frozen=True)
class LocalTask:
    """Rows of one file: those to ask, those to draw few-shot examples from, and how many the file has."""

    name: str
    path: Path
    shape: Shape
    rows: tuple[Row, ...]
    pool: tuple[Row, ...]
    total: int

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked: rows, examples and form."""
        return sha256_of_json(
            {"rows": self.rows, "pool": self.pool, "task": self.shape.task, "scored": self.shape.scored}
        )


@cache
def shapes() -> tuple[Shape, ...]:
    """The shapes of shapes.toml, the more special first."""
    table = read_table(Path(__file__).with_name("shapes.toml"))
    return tuple(Shape(name, **{**row, "fields": tuple(row["fields"])}) for name, row in table.items())


def local_tasks(
    source: str, limit: int | None = None, few_shot: int = 0, seed: int = 0
) -> list[LocalTask] | None:
    """The tasks of a local file or folder; None for a ``source`` that is no path and must be a task's name.

    ``limit`` rows of each are sampled, the same ones for the same ``seed``. Raises :class:`InputError` for a
    path that names nothing and for rows that cannot be asked, with file and line.
    """
    path = Path(source).expanduser()
    if path.is_file() and not path.name.endswith((".yaml", ".yml")):
        if not path.name.lower().endswith(SUFFIXES):
            raise InputError(f"{source} is no task: give a {', '.join(SUFFIXES)} file.")
        return [_task(path, limit, few_shot, seed)]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and p.name.lower().endswith(SUFFIXES))
        if not files:
            raise InputError(f"The folder {source} has no tasks: no {', '.join(SUFFIXES)} file in it.")
        return [_task(file, limit, few_shot, seed) for file in files]
    like_a_path = source.startswith((".", "/", "~")) or source.lower().endswith(
        (*SUFFIXES, ".json", ".gz", ".zst")
    )
    if like_a_path and not path.exists():
        raise InputError(f"The task {source} does not exist.")
    return None


def _task(path: Path, limit: int | None, few_shot: int, seed: int) -> LocalTask:
    numbered = read_rows(path)
    shape = _shape(path, numbered)
    rows = [_checked(row, shape, f"{path}, line {number}") for number, row in numbered]
    name = path.name[: -len(next(s for s in SUFFIXES if path.name.lower().endswith(s)))]
    asked, pool = sample(len(rows), limit, few_shot, f"{seed}:{name}", str(path))
    return LocalTask(
        name, path, shape, tuple(rows[i] for i in asked), tuple(rows[i] for i in pool), len(rows)
    )


def sample(
    total: int, limit: int | None, few_shot: int, seed: str, where: str
) -> tuple[list[int], list[int]]:
    """Which of ``total`` rows are asked, in order, and which give few-shot examples: no row does both."""
    order = list(range(total))
    random.Random(seed).shuffle(order)
    spare = min(_POOL, max(few_shot, total - (limit or total))) if few_shot else 0
    if total - spare < 1:
        raise InputError(f"{where} has {total} rows: too few for --few-shot {few_shot} and a row to ask.")
    asked = order[: min(limit or total, total - spare)]
    return sorted(asked), sorted(order[len(asked) : len(asked) + spare])


def read_rows(path: Path) -> list[tuple[int, Row]]:
    """The objects of a .jsonl file (.gz and .zst too) with their line numbers.

    Raises :class:`InputError` for a line that is no object, text that is no UTF-8, or an empty file.
    """
    rows: list[tuple[int, Row]] = []
    try:
        with open_packed(path) as raw:
            for number, line in enumerate(io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n"), 1):
                if line.strip():
                    rows.append((number, _object(line, f"{path}, line {number}")))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text ({error.reason}).") from None
    except BROKEN_ARCHIVE as error:
        raise InputError(f"{path} cannot be unpacked ({error}): fetch it again.") from None
    if not rows:
        raise InputError(f"{path} has no rows.")
    return rows


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise InputError(f"{where}: no JSON ({reason}); a .jsonl file has one object a line.") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: no JSON object; a .jsonl file has one a line.")
    return row


def _shape(path: Path, rows: Sequence[tuple[int, Row]]) -> Shape:
    number, first = rows[0]
    shape = next((s for s in shapes() if all(name in first for name in s.fields)), None)
    if shape is None:
        known = "; ".join(", ".join(s.fields) for s in shapes())
        raise InputError(
            f"{path}, line {number}: no task has rows with the fields {', '.join(first) or 'none'}; "
            f"known are rows with: {known}."
        )
    return shape


def _checked(row: Row, shape: Shape, where: str) -> dict[str, Any]:
    """The fields that ``shape`` asks for, each of its kind."""
    if missing := [name for name in shape.fields if name not in row]:
        raise InputError(
            f"{where}: no field {missing[0]!r}, which the rows before it have; a file's rows have one shape."
        )
    for name in shape.fields:
        if name not in ("choices", "gold") and not isinstance(row[name], str):
            raise InputError(f"{where}: {name!r} is no text.")
    if "choices" in shape.fields:
        _check_choices(row["choices"], row["gold"], shape, where)
    if shape.blank and "_" not in row[shape.blank]:
        raise InputError(f"{where}: {shape.blank!r} has no blank (_) for the choices.")
    for name in ("target", "answer"):
        if name in shape.fields and not row[name].strip():
            raise InputError(f"{where}: {name!r} is empty.")
    return {name: row[name] for name in shape.fields}


def _check_choices(choices: Any, gold: Any, shape: Shape, where: str) -> None:
    good = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not good or len(choices) < 2:
        raise InputError(f"{where}: 'choices' must be a list of two or more texts, none of them empty.")
    if shape.name == "subject" and len(choices) > _LETTERS:
        raise InputError(f"{where}: {len(choices)} choices; there are letters for {_LETTERS}.")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise InputError(
            f"{where}: 'gold' is {gold!r}; it must be the number of one of the {len(choices)} choices, counted from 0."
        )
