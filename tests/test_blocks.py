"""What can become linear, as it is written, ordered and counted; batches, padding, choices and tokens of images."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from nbl_export.batch import (
    FIRST,
    MASK,
    PIXELS,
    POSITIONS,
    TOKEN_TYPES,
    TOKENS,
    are_media,
    batch_of_rows,
    differing,
    left_padded,
    moved,
    prefix_mask,
    prefix_padded,
    real_positions,
    right_padded,
    rows_of_batch,
    shortfall,
    words,
)
from nbl_export.blocks import (
    ATTENTION,
    LONGEST_SPAN,
    PARTS,
    SPAN,
    Block,
    Mlp,
    Span,
    all_parts,
    as_json,
    attentions,
    block_of,
    described,
    from_json,
    grouped,
    layer_of,
    most_blocks,
    part_of,
    parts_in,
    spans_of,
    with_block,
)

ORDER: list[Block] = [0, Mlp(0), Span(0, 0), Span(0, 3), 1, Mlp(1), 2, Mlp(10), Span(10, 12), 11]


def test_an_mlp_comes_after_its_layer_s_attention_and_before_the_next_layer() -> None:
    assert sorted(ORDER, reverse=True) == ORDER[::-1]
    assert min(ORDER[1:]) == Mlp(0) and max(ORDER) == 11
    one, mlp = 1, Mlp(1)
    assert one != mlp and mlp != one and mlp == Mlp(1) and mlp != Mlp(2)
    assert len({1, Mlp(1), Mlp(1), Span(1, 1), Span(1, 1), Span(1, 2)}) == 4


@pytest.mark.parametrize("block", ORDER)
def test_a_block_is_read_as_it_is_written(block: Block) -> None:
    assert block_of(str(block)) == block
    assert from_json(as_json(block)) == block
    assert type(as_json(block)) is (int if isinstance(block, int) else str)
    assert copy.deepcopy(block) == block


@pytest.mark.parametrize(
    "text",
    [
        *("", "-1", "07", "7.", "7.MLP", "7.mlp.mlp", "7.attention", "mlp", ".mlp", "٧", "7 ", "7-8"),
        *("7-7.span", "8-7.span", "07.span", "7-08.span", "7-.span", "-7.span", "7-8-9.span", "٧.span"),
    ],
)
def test_what_is_no_block_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"write 7 for an attention, 7\.mlp for an MLP, 7-9\.span for a span"
    ):
        block_of(text)


def test_parts_of_a_layer() -> None:
    assert [layer_of(block) for block in ORDER] == [0, 0, 0, 0, 1, 1, 2, 10, 10, 11]
    assert [part_of(block) for block in ORDER[:3]] == ["attention", "mlp", "span"]
    assert attentions(ORDER) == (0, 1, 2, 11)
    assert (described(3), described(Mlp(3))) == ("layer 3", "the MLP of layer 3")


# spans -------------------------------------------------------------------------------------------


def test_a_span_has_every_part_of_its_layers_the_map_first() -> None:
    assert parts_in(Span(3, 4)) == (3, Mlp(3), 4, Mlp(4))
    assert parts_in(3) == (3,) and parts_in(Mlp(3)) == (Mlp(3),)
    assert all_parts([Mlp(7), Span(3, 3), 0]) == (0, 3, Mlp(3), Mlp(7))
    assert str(Span(3, 3)) == "3.span" and str(Span(3, 4)) == "3-4.span"
    assert (layer_of(Span(3, 4)), part_of(Span(3, 4))) == (3, "span")


def test_spans_of_layers_have_no_gaps_and_are_no_longer_than_the_longest() -> None:
    assert spans_of([0, 1, 4]) == [Span(0, 0), Span(0, 1), Span(1, 1), Span(4, 4)]
    assert max(len(span.layers) for span in spans_of(range(30))) == LONGEST_SPAN
    assert len(spans_of(range(30))) == 30 + 29 + 28 + 27


@pytest.mark.parametrize(
    ("blocks", "new", "found"),
    [
        ((1, Mlp(4)), 2, (1, Mlp(4), 2)),
        ((), Span(1, 2), (Span(1, 2),)),
        # It takes the place of what is within it.
        ((0, 1, Mlp(2), 5), Span(1, 2), (0, 5, Span(1, 2))),
        ((Span(1, 1), Span(2, 2)), Span(1, 3), (Span(1, 3),)),
        # A part of something is there already, or it is all there.
        ((Span(1, 2),), Span(2, 3), None),
        ((Span(1, 2),), Span(1, 2), None),
        ((Span(1, 2),), Mlp(2), None),
        ((Span(1, 2),), 1, None),
        ((7,), 7, None),
    ],
)
def test_a_block_is_added_to_others(
    blocks: tuple[Block, ...], new: Block, found: tuple[Block, ...] | None
) -> None:
    assert with_block(blocks, new) == found


@pytest.mark.parametrize(
    "blocks",
    [
        (),
        (0, Mlp(3)),
        (Span(1, 1),),
        (Span(1, 2), Span(3, 4), 7),
        (0, Span(1, 2), Mlp(3), 4, Mlp(4), Span(6, 6)),
    ],
    ids=str,
)
def test_what_was_chosen_is_told_from_its_parts(blocks: tuple[Block, ...]) -> None:
    linear = [parts_in(block)[0] for block in blocks]
    dropped = [part for block in blocks for part in parts_in(block)[1:]]
    assert grouped(linear, dropped) == tuple(sorted(blocks))


def test_what_is_dropped_without_a_map_before_it_is_alone() -> None:
    assert grouped([Mlp(1)], [1, 2, Mlp(2), 5]) == (1, Mlp(1), 2, Mlp(2), 5)


def test_the_most_blocks_that_a_model_can_have() -> None:
    assert most_blocks(3, PARTS) == [0, Mlp(0), 1, Mlp(1), 2, Mlp(2)]
    assert most_blocks(3, (ATTENTION,)) == [0, 1, 2] and most_blocks(0, PARTS) == []
    spans = [Span(0, 0), Span(0, 1), Span(0, 2), Span(1, 1), Span(1, 2), Span(2, 2)]
    assert most_blocks(3, (SPAN,)) == spans and len(most_blocks(9, (SPAN,))) == 4 * 9 - (1 + 2 + 3)
    assert all_parts(most_blocks(3, (*PARTS, SPAN))) == tuple(most_blocks(3, PARTS))


# batch -----------------------------------------------------------------------------------

RAGGED = [np.array([7, 8, 9], np.int32), np.array([4], np.int32), np.array([5, 6], np.int32)]
ROWS: list[dict[str, Any]] = [
    {TOKENS: row[None], TOKEN_TYPES: np.array([types])}
    for row, types in zip(RAGGED, ([0, 1, 1], [1], [0, 1]), strict=True)
]
# Padded with 9, which is a token of a row too.
RIGHT = {
    TOKENS: [[7, 8, 9], [4, 9, 9], [5, 6, 9]],
    TOKEN_TYPES: [[0, 1, 1], [1, 0, 0], [0, 1, 0]],
    MASK: [[1, 1, 1], [1, 0, 0], [1, 1, 0]],
}
LEFT = {
    TOKENS: [[7, 8, 9], [9, 9, 4], [9, 5, 6]],
    TOKEN_TYPES: [[0, 1, 1], [0, 0, 1], [0, 0, 1]],
    MASK: [[1, 1, 1], [0, 0, 1], [0, 1, 1]],
}


def as_lists(batch: Any) -> dict[str, Any]:
    return {name: array.tolist() for name, array in batch.items()}


def test_padding_by_hand() -> None:
    left, (ids, positions), prefix = (
        pad(RAGGED, pad=9) for pad in (left_padded, right_padded, prefix_padded)
    )
    everywhere = [[0, 1, 2]] * 3
    assert [a.tolist() for a in left] == [LEFT[TOKENS], LEFT[MASK], [[0, 1, 2], [0, 0, 0], [0, 0, 1]]]
    assert [ids.tolist(), positions.tolist()] == [RIGHT[TOKENS], everywhere]
    assert [a.tolist() for a in prefix] == [RIGHT[TOKENS], RIGHT[MASK], everywhere]
    assert {a.dtype for a in (*left, ids, positions, *prefix)} == {np.dtype(np.int64)}
    assert prefix_mask(np.array([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]


@pytest.mark.parametrize(("left", "expected"), [(False, RIGHT), (True, LEFT)], ids=["right", "left"])
def test_rows_become_a_batch_and_rows_again(left: bool, expected: dict[str, Any]) -> None:
    batch = batch_of_rows(ROWS, pad=9, left=left)
    assert as_lists(batch) == expected
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int64)}
    assert [as_lists(row) for row in rows_of_batch(batch)] == [as_lists(row) for row in ROWS]
    found = real_positions(batch, 3)
    assert found.dtype == bool and found.tolist() == [[bool(m) for m in row] for row in expected[MASK]]
    # Positions are no part of a row.
    with_positions = {**batch, POSITIONS: np.arange(9).reshape(3, 3)}
    assert all(set(row) == {TOKENS, TOKEN_TYPES} for row in rows_of_batch(with_positions))


def test_without_a_mask_every_token_is_a_row_s_own() -> None:
    ids = np.array([[3, 0, 0], [0, 5, 6]])
    assert [row[TOKENS].tolist() for row in rows_of_batch({TOKENS: ids})] == [[[3, 0, 0]], [[0, 5, 6]]]
    assert real_positions({TOKENS: ids}, 3).tolist() == [[True] * 3] * 2


def test_images_have_no_padding() -> None:
    images = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
    rows = rows_of_batch({PIXELS: images})
    assert [row[PIXELS].shape for row in rows] == [(1, 3, 2, 2)] * 2
    again = batch_of_rows(rows)
    assert set(again) == {PIXELS} and np.array_equal(again[PIXELS], images)
    # Attention sees more positions than the image has pixels in a row; all are real.
    assert real_positions({PIXELS: images}, 5).tolist() == [[True] * 5] * 2


def test_words_are_the_text_without_its_images() -> None:
    rows = np.array([[1, FIRST, 2], [FIRST + 1, FIRST + 2, 3]], dtype=np.int32)
    assert are_media(rows).tolist() == [[False, True, False], [True, True, False]]
    assert words(rows).tolist() == [[1, 2, 3], [1, 2, 3]] and words(rows).dtype == np.int32


INF = float("inf")
SCORES = np.array([[4.0, 3.0, 1.0], [5.0, -INF, 2.0]], np.float32)


@pytest.mark.parametrize(
    ("scores", "chosen", "short"),
    [
        (SCORES, [[0, 1], [2, 0]], [0, 0]),  # the best, in any order
        (SCORES, [[1, 2], [0, 2]], [2, 0]),
        (SCORES, [[0], [2]], [0, 3]),
        (SCORES, [[0, 1], [0, 1]], [0, INF]),  # what is ruled out
        (np.full((1, 3), -INF, np.float32), [[1, 2]], [0]),
        # Of groups the worst counts: [2 tokens, 2 groups, 3].
        (np.stack([SCORES, SCORES[::-1]], axis=1), [[[0], [2]], [[0], [0]]], [3, 0]),
    ],
)
def test_how_far_a_choice_falls_short_of_the_best(scores: Any, chosen: Any, short: list[float]) -> None:
    assert shortfall(scores, np.array(chosen)).tolist() == short


def test_how_far_choices_are_apart() -> None:
    assert moved(SCORES, SCORES) == 0
    assert moved(SCORES, np.array([[4.0, 3.5, 1.0], [5.0, 0.0, -INF]], np.float32)) == 0.5
    one = np.array([[0, 1], [2, 1], [3, 0]])
    assert differing(one, one[:, ::-1]) == 0
    assert differing(one, np.array([[1, 0], [3, 0], [3, 1]])) == 2
