"""Local tasks: .jsonl files whose rows are checked and sampled, and whose fields decide how the rows are asked."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nbl_export.calibrate.documents import BROKEN_ARCHIVE, lines_of, open_packed
from nbl_export.datafile import read_table
from nbl_export.errors import InputError
from nbl_export.files import parse_json, sha256_of_json, user_path

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_LETTERS = 26
# Few-shot examples are drawn from this many rows that are not asked; more would only enlarge the digest.
_POOL = 64

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """One table of shapes.toml: the fields of a row, how it is asked, and the metric whose recovery is reported."""

    name: str
    fields: tuple[str, ...]
    task: Mapping[str, Any]
    scored: str
    chance: str
    blank: str | None = None


@dataclass(frozen=True)
class LocalTask:
    """Rows of one file: those to ask, those for few-shot examples, and the total number."""

    name: str
    path: Path
    shape: Shape
    rows: tuple[Row, ...]
    pool: tuple[Row, ...]
    total: int

    @property
    def digest(self) -> str:
        """SHA-256 of the rows, the examples and the format of the task."""
        return sha256_of_json(
            {"rows": self.rows, "pool": self.pool, "task": self.shape.task, "scored": self.shape.scored}
        )


@cache
def shapes() -> tuple[Shape, ...]:
    """The shapes of shapes.toml, more specific ones first."""
    table = read_table(Path(__file__).with_name("shapes.toml"))
    return tuple(Shape(name, **{**row, "fields": tuple(row["fields"])}) for name, row in table.items())


def local_tasks(
    source: str, limit: int | None = None, few_shot: int = 0, seed: int = 0
) -> list[LocalTask] | None:
    """The tasks of a local file or folder; None for a ``source`` that is not a path, so must be the name of a task.

    ``limit`` rows of each are sampled, the same ones for the same ``seed``. Raises :class:`InputError` for a path that
    does not exist, and for invalid rows, with file and line.
    """
    files = task_files(source)
    return None if files is None else [_task(file, limit, few_shot, seed) for file in files]


def task_files(source: str) -> list[Path] | None:
    """The files of a local source; None for a name. Raises :class:`InputError` for a path without tasks."""
    path = user_path(source, "The task")
    if path.is_file() and not path.name.endswith((".yaml", ".yml")):
        if not path.name.lower().endswith(SUFFIXES):
            raise InputError(f"{source} is not a task: give a {', '.join(SUFFIXES)} file.")
        return [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and p.name.lower().endswith(SUFFIXES))
        if not files:
            raise InputError(f"The folder {source} has no tasks: no {', '.join(SUFFIXES)} file in it.")
        return files
    like_a_path = source.startswith((".", "/", "~")) or source.lower().endswith(
        (*SUFFIXES, ".json", ".gz", ".zst")
    )
    if like_a_path and not path.exists():
        raise InputError(f"The task {source} does not exist: check the path.")
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
    """The indices of the rows that are asked, in order, and of those for few-shot examples, which are disjoint."""
    order = list(range(total))
    random.Random(seed).shuffle(order)
    spare = min(_POOL, max(few_shot, total - (limit or total))) if few_shot else 0
    if total - spare < 1:
        raise InputError(
            f"{where} has {total} rows: too few for --few-shot {few_shot} and a row to ask; lower it."
        )
    asked = order[: min(limit or total, total - spare)]
    return sorted(asked), sorted(order[len(asked) : len(asked) + spare])


def read_rows(path: Path) -> list[tuple[int, Row]]:
    """The objects of a .jsonl file (.gz and .zst too) with their line numbers.

    Raises :class:`InputError` for a line that is not an object, text that is not UTF-8, or an empty file.
    """
    rows: list[tuple[int, Row]] = []
    try:
        with open_packed(path) as raw:
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="\n")
            for number, line in enumerate(lines_of(path, text), 1):
                if line.strip():
                    rows.append((number, _object(line, f"{path}, line {number}")))
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason}): convert it.") from None
    except BROKEN_ARCHIVE as error:
        raise InputError(f"{path} cannot be unpacked ({error}): download it again.") from None
    if not rows:
        raise InputError(f"{path} has no rows: give another file.")
    return rows


def _object(line: str, where: str) -> Row:
    try:
        row = parse_json(line)
    except ValueError as error:
        odd = isinstance(error, UnicodeError)
        reason = "half of a surrogate pair" if odd else getattr(error, "msg", str(error))
        raise InputError(f"{where}: not JSON ({reason}); a .jsonl file needs one object per line.") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object; a .jsonl file needs one per line.")
    return row


def _shape(path: Path, rows: Sequence[tuple[int, Row]]) -> Shape:
    number, first = rows[0]
    shape = next((s for s in shapes() if all(name in first for name in s.fields)), None)
    if shape is None:
        known = "; ".join(", ".join(s.fields) for s in shapes())
        raise InputError(
            f"{path}, line {number}: no task has rows with the fields {', '.join(first) or 'none'}: use one of these "
            f"sets of fields: {known}."
        )
    return shape


def _checked(row: Row, shape: Shape, where: str) -> dict[str, Any]:
    """The fields of ``shape``, with their types checked."""
    if missing := [name for name in shape.fields if name not in row]:
        raise InputError(
            f"{where}: no field {missing[0]!r}, unlike the rows before it; all rows of a file need the same fields."
        )
    for name in shape.fields:
        if name not in ("choices", "gold") and not isinstance(row[name], str):
            raise InputError(f"{where}: {name!r} is not text; give a string.")
    if "choices" in shape.fields:
        _check_choices(row["choices"], row["gold"], shape, where)
    if shape.blank and "_" not in row[shape.blank]:
        raise InputError(f"{where}: {shape.blank!r} has no blank (_) for the choices; add one.")
    for name in ("target", "answer"):
        if name in shape.fields and not row[name].strip():
            raise InputError(f"{where}: {name!r} is empty; give some text.")
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
