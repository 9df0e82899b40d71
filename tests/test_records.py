"""Dataclasses survive JSON, and what is not theirs is refused in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from nbl_export.errors import InputError
from nbl_export.records import from_json, part_from_json, to_json


@dataclass(frozen=True)
class Row:
    layer: int
    kl: float
    kind: Literal["full", "sliding"] = "full"


@dataclass(frozen=True)
class Other:
    saved: float


@dataclass(frozen=True)
class Page:
    title: str
    rows: tuple[Row, ...]
    first: Row | None = None
    either: Row | Other | None = None
    by_layer: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    free: Mapping[str, Any] = field(default_factory=dict)


PAGE = Page(
    "loss",
    (Row(0, 0.25), Row(1, math.inf, "sliding")),
    first=Row(2, -math.inf),
    either=Other(1.5),
    by_layer={"3": 0.5},
    notes=["a", "b"],
    free={"any": [1, {"thing": None}]},
)


def read(raw: Any) -> Page:
    return from_json(Page, raw, "The page", "write it again")


def test_a_value_survives_json() -> None:
    again = read(json.loads(json.dumps(to_json(PAGE), allow_nan=False)))
    assert again.rows == PAGE.rows and again.first == PAGE.first and again.either == PAGE.either
    assert dict(again.by_layer) == PAGE.by_layer and list(again.notes) == PAGE.notes
    assert again.free == PAGE.free and again.title == PAGE.title
    assert isinstance(again.rows, tuple) and isinstance(again.rows[0], Row)


def test_nan_survives() -> None:
    raw = to_json(Page("x", (Row(0, math.nan),)))
    assert raw["rows"][0]["kl"] == "nan" and math.isnan(read(raw).rows[0].kl)


def test_missing_fields_take_their_defaults() -> None:
    assert read({"title": "x", "rows": []}) == Page("x", ())


BAD = {
    "an unknown field": {"title": "x", "rows": [], "titel": "y"},
    "an unknown field inside": {"title": "x", "rows": [{"layer": 0, "kl": 1.0, "kll": 2}]},
    "no title": {"rows": []},
    "a number for a string": {"title": 3, "rows": []},
    "a string for a number": {"title": "x", "rows": [{"layer": 0, "kl": "much"}]},
    "a string for a count": {"title": "x", "rows": [{"layer": "0", "kl": 1.0}]},
    "true for a count": {"title": "x", "rows": [{"layer": True, "kl": 1.0}]},
    "a word that is no choice": {"title": "x", "rows": [{"layer": 0, "kl": 1.0, "kind": "other"}]},
    "a list": [1, 2],
    "nothing": None,
    "rows that are a number": {"title": "x", "rows": 4},
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_page_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(InputError, match=r"^The page is damaged \(.+\): write it again\.$") as caught:
        read(BAD[name])
    assert "\n" not in str(caught.value)


def test_a_part_of_an_object() -> None:
    asked = {"layer": 3, "kl": 0.5, "other": [1]}
    assert part_from_json(Row, asked, "The row", "write it again") == Row(3, 0.5)
    for bad in ({**asked, "layer": "3"}, {"layer": 3}):
        with pytest.raises(InputError, match=r"^The row is damaged \(.+\): write it again\.$"):
            part_from_json(Row, bad, "The row", "write it again")
