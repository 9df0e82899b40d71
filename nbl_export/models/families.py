"""Families whose attention or MLP is not found by the generic search: rows of ``families.toml``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nbl_export.datafile import read_table


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


def family_of(model_type: str) -> Family:
    """The row of ``model_type``, or the common structure."""
    return _rows().get(model_type, Family())


@cache
def _rows() -> dict[str, Family]:
    table = read_table(Path(__file__).parent / "families.toml")
    rows = [Family(**{**row, "models": tuple(row["models"])}) for row in table.values()]
    return {model_type: row for row in rows for model_type in row.models}
