"""Rows that are made of a text's words: what each asks of the context, and what is counted of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate.synthetic import synthetic_rows
from nbl_export.calibrate.text import CalibrationText

WORDS = [a + b + c for a in "bdfgk" for b in "aeiou" for c in ("ma", "ru", "lin")]
PROSE = ". ".join(" ".join(WORDS[i : i + 5]) for i in range(0, len(WORDS), 5)) + "."


class Letters:
    """One token for each letter, from 3 on."""

    def __call__(self, text: str, **_: Any) -> Any:
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def made(prose: str = PROSE, length: int = 256, seed: int = 0, second: bool = False) -> dict[str, Any]:
    text = (prose * (2 * length // len(prose) + 1))[: 2 * length]
    rows = np.array([ord(letter) for letter in text], dtype=np.int32).reshape(2, length)
    none: Any = None
    whole = CalibrationText(rows, rows, none, rows, none, np.array([1], dtype=np.int32))
    rows = synthetic_rows(whole, Letters(), seed)
    half = len(rows) // 2
    return {row.kind: row for row in (rows[half:] if second else rows[:half])}


def written(row: Any) -> str:
    assert row.tokens[0] == 1 and row.tokens.dtype == np.int32, "the start of a prompt"
    return Letters().decode(row.tokens[1:].tolist())


def test_each_kind_asks_the_context() -> None:
    rows = made(length=512)
    assert {kind: len(row.tokens) for kind, row in rows.items()} == dict.fromkeys(rows, 128) | {
        "far look-up": 512
    }
    repeated = rows["repeated tokens"]
    np.testing.assert_array_equal(repeated.tokens, np.tile(repeated.tokens[:32], 4))
    assert (repeated.owner == 0).sum() == 96 and repeated.counted[32]
    assert " . " in written(rows["spaced punctuation"])
    objects = written(rows["JSON"]).splitlines()[1:-1]
    assert len({tuple(line.split('"')[1::4]) for line in objects}) == 1, "the same keys"
    assert {line.count("|") for line in written(rows["table"]).splitlines()[:-1]} == {5}
    looked_up: dict[str, str] = {}
    for line in written(rows["look-up"]).splitlines()[:-1]:
        key, value = line.split(" = ")
        assert looked_up.setdefault(key, value) == value
    assert "Twice: " in written(rows["few-shot"])


def test_what_is_far_stands_in_prose_and_is_asked_for_at_the_end() -> None:
    row = made(length=512)["far look-up"]
    lines = written(row).splitlines()
    pairs = [line for line in lines if ": " in line]
    said, asked = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    assert len(said) > 2 and said != asked and sorted(said) == sorted(asked)
    assert lines[-len(asked) :] == asked
    assert sum(len(line) for line in lines if ": " not in line) > 512 / 5, "prose between"
    values = "".join(line.partition(":")[2] for line in asked)
    assert Letters().decode(row.tokens[row.counted].tolist()) == values


def test_a_seed_gives_the_same_rows_and_another_others_as_the_second_of_a_kind_is() -> None:
    one, same, others = made(), made(), [made(seed=1), made(second=True)]
    for kind in one:
        np.testing.assert_array_equal(one[kind].tokens, same[kind].tokens)
        assert not any(np.array_equal(one[kind].tokens, other[kind].tokens) for other in others)


@pytest.mark.parametrize(
    ("prose", "length", "kinds"),
    [("1, 2, 3; ", 256, 1), (PROSE, 8, 1), (PROSE, 64, 1), (PROSE, 200, 6), (PROSE, 256, 7)],
)
def test_a_text_with_few_words_gives_the_rows_that_need_none(prose: str, length: int, kinds: int) -> None:
    rows = made(prose, length)
    assert len(rows) == kinds
    assert all(
        len(row.tokens) == (length if kind == "far look-up" else min(length, 128))
        for kind, row in rows.items()
    )
