"""What can become linear, as it is written, ordered and counted."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from nbl_export.blocks import (
    Block,
    Mlp,
    as_json,
    attentions,
    block_of,
    counted,
    described,
    from_json,
    layer_of,
    part_of,
)
from nbl_export.errors import InputError
from nbl_export.files import jsonable
from nbl_export.records import from_json as record
from nbl_export.records import to_json

ORDER: list[Block] = [0, Mlp(0), 1, Mlp(1), 2, Mlp(10), 11]


def test_an_mlp_comes_after_its_layer_s_attention_and_before_the_next_layer() -> None:
    assert sorted(ORDER, reverse=True) == ORDER[::-1]
    assert min(ORDER[1:]) == Mlp(0) and max(ORDER) == 11
    one, mlp = 1, Mlp(1)
    assert one != mlp and mlp != one and mlp == Mlp(1) and mlp != Mlp(2)
    assert len({1, Mlp(1), Mlp(1)}) == 2


@pytest.mark.parametrize("block", ORDER)
def test_a_block_is_read_as_it_is_written(block: Block) -> None:
    assert block_of(str(block)) == block
    assert from_json(as_json(block)) == block
    assert type(as_json(block)) is (str if isinstance(block, Mlp) else int)
    assert copy.deepcopy(block) == block


@pytest.mark.parametrize(
    "text", ["", "-1", "07", "7.", "7.MLP", "7.mlp.mlp", "7.attention", "mlp", ".mlp", "٧", "7 "]
)
def test_what_is_no_block_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write 7 for an attention, 7\.mlp for an MLP"):
        block_of(text)


@pytest.mark.parametrize("value", [True, 1.0, "7", "x.mlp", None, [7]])
def test_json_that_is_no_block_is_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        from_json(value)


def test_parts_of_a_layer() -> None:
    assert [layer_of(block) for block in ORDER] == [0, 0, 1, 1, 2, 10, 11]
    assert [part_of(block) for block in ORDER[:2]] == ["attention", "mlp"]
    assert attentions(ORDER) == (0, 1, 2, 11)
    assert (described(3), described(Mlp(3))) == ("layer 3", "the MLP of layer 3")


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ((), "0 attention layers"),
        ((1,), "1 attention layer"),
        ((1, 2, Mlp(1)), "2 attention layers and 1 MLP"),
        ((Mlp(1), Mlp(2)), "2 MLPs"),
    ],
)
def test_blocks_are_counted_in_words(blocks: tuple[Block, ...], words: str) -> None:
    assert counted(blocks) == words


@dataclass(frozen=True)
class _Kept:
    layers: tuple[Block, ...]
    worst: Block | None = None


def test_a_record_has_attentions_as_numbers_and_mlps_as_text() -> None:
    kept = _Kept((1, Mlp(1)), Mlp(3))
    raw = to_json(kept)
    assert raw == {"layers": [1, "1.mlp"], "worst": "3.mlp"}
    assert record(_Kept, raw, "it", "again") == kept
    assert jsonable(asdict(kept)) == raw
    with pytest.raises(InputError, match="it is damaged"):
        record(_Kept, {"layers": ["1"]}, "it", "again")
