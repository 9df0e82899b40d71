"""The shapes an engine is built for: what is asked for, what the model has, and that they fit together."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbl_export.engine.profiles import DECODE, PREFILL, Limits, Profile, limits, profiles
from nbl_export.errors import BuildError, InputError

B, S, PAST, TOTAL, MAX = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
    "max_sequence_length",
)
CONCAT: dict[str, list[int | str]] = {
    "input_ids": [B, S],
    "attention_mask": [B, TOTAL],
    "position_ids": [B, S],
    "past_key_values.0.key": [B, 2, PAST, 8],
    "past_key_values.0.value": [B, 2, PAST, 16],
}
STATIC: dict[str, list[int | str]] = {
    "input_ids": [B, S],
    "position_ids": [B, S],
    "write_indices": [B],
    "past_key_values.0.key": [B, 2, MAX, 8],
    "past_key_values.0.value": [B, 2, MAX, 16],
}


# limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "model", "expected"),
    [
        ((4, None, None), None, (4, 512, 2048)),
        ((4, None, None), 8192, (4, 512, 2048)),
        ((4, None, None), 1024, (4, 512, 1024)),
        ((4, None, None), 256, (4, 256, 256)),
        ((1, None, 300), 8192, (1, 300, 300)),
        ((1, 17, 4096), 4096, (1, 17, 4096)),
        ((1, 1000, None), None, (1, 1000, 2048)),
        ((1, None, 1 << 20), None, (1, 512, 1 << 20)),
        ((1, 1, 2), 2, (1, 1, 2)),
        ((1, 2, 2), 2, (1, 2, 2)),
    ],
)
def test_what_is_not_asked_for_goes_as_far_as_the_model(
    asked: tuple[int, int | None, int | None], model: int | None, expected: tuple[int, int, int]
) -> None:
    assert limits(*asked, model) == Limits(*expected)


@pytest.mark.parametrize(
    ("asked", "model", "words"),
    [
        ((1, None, 513), 512, ("--max-context is 513", "512 positions")),
        ((1, 200, 100), None, ("--max-seq is 200", "--max-context (100)")),
        ((1, 4096, None), None, ("--max-seq is 4,096", "(2,048)")),
        ((1, 513, None), 512, ("--max-seq is 513", "(512)")),
        ((0, None, None), None, ("--max-batch is 0", "at least 1")),
        ((-1, None, None), None, ("--max-batch is -1",)),
        ((1, 0, None), None, ("--max-seq is 0", "at least 1")),
        ((1, -5, None), None, ("--max-seq is -5",)),
        ((1, None, 1), None, ("--max-context is 1", "at least 2")),
        ((1, 1, 0), None, ("--max-",)),
        ((1, None, -7), None, ("--max-",)),
    ],
)
def test_limits_that_cannot_be_are_refused(
    asked: tuple[int, int | None, int | None], model: int | None, words: tuple[str, ...]
) -> None:
    with pytest.raises(InputError) as caught:
        limits(*asked, model)
    for word in words:
        assert word in str(caught.value)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


# profiles ----------------------------------------------------------------------------------------


@st.composite
def any_limits(draw: st.DrawFn) -> Limits:
    context = draw(st.integers(2, 5000))
    return Limits(draw(st.integers(1, 64)), draw(st.integers(1, context)), context)


def dimensions(profile: Profile, inputs: dict[str, list[int | str]]) -> dict[str, tuple[int, ...]]:
    """Minimum, optimum and maximum of each symbolic dimension, which all inputs must agree on."""
    assert profile.shapes.keys() == inputs.keys()
    found: dict[str, tuple[int, ...]] = {}
    for name, dims in inputs.items():
        three = profile.shapes[name]
        assert len(three) == 3 and all(len(shape) == len(dims) for shape in three)
        for axis, dim in enumerate(dims):
            sizes = tuple(shape[axis] for shape in three)
            assert sizes[0] <= sizes[1] <= sizes[2]
            if isinstance(dim, int):
                assert sizes == (dim, dim, dim)
            else:
                assert found.setdefault(dim, sizes) == sizes, f"{name} contradicts another input on {dim}"
    return found


@given(any_limits())
def test_shapes_of_a_growing_cache_are_ordered_and_consistent(asked: Limits) -> None:
    for profile, name in zip(profiles(CONCAT, asked), (PREFILL, DECODE), strict=True):
        assert profile.name == name
        found = dimensions(profile, CONCAT)
        assert (found[B][0], found[B][2]) == (1, asked.max_batch)
        # The mask spans past and new tokens: also where the library tries the extremes.
        for past, new, total in zip(found[PAST], found[S], found[TOTAL], strict=True):
            assert past + new == total
        assert found[TOTAL][2] == asked.max_context


@given(any_limits())
def test_prefill_begins_with_nothing_and_decode_goes_to_the_end(asked: Limits) -> None:
    prefill, decode = (dimensions(p, CONCAT) for p in profiles(CONCAT, asked))
    assert (prefill[S][0], prefill[S][2]) == (1, asked.max_seq)
    assert prefill[PAST][0] == 0 and prefill[PAST][1] == 0
    assert decode[S] == (1, 1, 1)
    # After a prompt of one token there is one in the cache; the last step makes the context full.
    assert (decode[PAST][0], decode[PAST][2]) == (1, asked.max_context - 1)


@given(any_limits())
def test_a_static_cache_is_as_long_as_the_context_throughout(asked: Limits) -> None:
    c = asked.max_context
    prefill, decode = (dimensions(p, STATIC) for p in profiles(STATIC, asked))
    assert prefill[MAX] == decode[MAX] == (c, c, c)
    assert prefill[B] == decode[B]
    assert (prefill[S][0], prefill[S][2], decode[S]) == (1, asked.max_seq, (1, 1, 1))


def test_a_profile_by_hand() -> None:
    prefill, decode = profiles(CONCAT, Limits(4, 512, 2048))
    assert prefill.shapes["attention_mask"] == ((1, 1), (1, 512), (4, 2048))
    assert prefill.shapes["past_key_values.0.value"] == ((1, 2, 0, 16), (1, 2, 0, 16), (4, 2, 1536, 16))
    assert decode.shapes["attention_mask"] == ((1, 2), (1, 1025), (4, 2048))
    assert decode.shapes["past_key_values.0.key"] == ((1, 2, 1, 8), (1, 2, 1024, 8), (4, 2, 2047, 8))
    assert decode.shapes["input_ids"] == ((1, 1), (1, 1), (4, 1))


@pytest.mark.parametrize("dim", ["beam_width", "sequence", "", "None"])
def test_a_dimension_that_no_decoder_has_is_refused(dim: str) -> None:
    inputs = {**CONCAT, "cross_attention": [B, dim, 4]}
    with pytest.raises(BuildError, match=f"cross_attention has the dimension {re.escape(repr(dim))}"):
        profiles(inputs, Limits(1, 2, 4))
