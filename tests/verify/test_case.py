"""What is verified, rows of held-out text by hand, and what a verification collects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate.text import CalibrationText
from nbl_export.graph.rounding import UNTIMED
from nbl_export.progress import Silent
from nbl_export.records import Check
from nbl_export.settings import VerifySettings
from nbl_export.verify.case import DecoderCase
from nbl_export.verify.measurement import Measurement
from nbl_export.verify.speed.pair import fitting_contexts
from tests.runtime.fake_tensorrt import Graphs

NONE: Any = None


def case(
    heldout: Any = None, start: tuple[int, ...] = (1,), path: Path = NONE, **settings: Any
) -> DecoderCase:
    rows = np.asarray([[0]] if heldout is None else heldout, dtype=np.int32)
    text = CalibrationText(NONE, NONE, NONE, rows, NONE, np.array(start, dtype=np.int32))
    return DecoderCase(NONE, NONE, path, path, VerifySettings(**settings), Silent(), text)


def test_rows_are_pieces_of_the_text_with_room_for_the_steps() -> None:
    found = case(np.arange(10, 22).reshape(3, 4), decode_steps=2).rows((3, 1))
    # Five tokens and the next three, each after the one that a text begins with.
    assert [row.tolist() for row in found] == [[1, 10, 11, 12, 13, 14], [1, 15, 16, 17]]
    assert {row.dtype for row in found} == {np.dtype(np.int32)}


@pytest.mark.parametrize("start", [(), (7,), (7, 8)])
def test_rows_begin_as_prompts_of_this_model_do(start: tuple[int, ...]) -> None:
    found = case(np.arange(10, 22).reshape(3, 4), start, decode_steps=1).rows((2, 2))
    assert [row.tolist() for row in found] == [[*start, 10, 11, 12], [*start, 13, 14, 15]]


@pytest.mark.parametrize(
    ("precision", "speed", "why"),
    [
        ("fp32", True, None),
        ("fp32", False, "--no-speed"),
        ("fp16", True, UNTIMED),
        ("fp16", False, "--no-speed"),
    ],
)
def test_why_a_graph_is_not_timed(graphs: Graphs, precision: str, speed: bool, why: str | None) -> None:
    found = case(path=graphs("concat", precision, (0, 3)), speed=speed)
    assert found.precision.name == precision
    assert found.why_not_timed == why


@pytest.mark.parametrize(("where", "said"), [("at layer 3", "one; two; at layer 3"), (None, "one; two")])
def test_what_is_not_says_each_gate_and_where_it_is_lost(where: str | None, said: str) -> None:
    found = Measurement()
    found.check_parity(["one", "two"], "all within", lambda: where)
    assert found.checks == [Check("parity", "failed", said)] and found.divergence == where


@pytest.mark.parametrize(
    ("limit", "room", "fitting", "dropped"),
    [
        (None, 1, [16, 64, 512], ""),
        (512, 0, [16, 64, 512], ""),
        (512, 1, [16, 64], "512"),
        (16, 1, [8], "16, 64, 512"),  # half of the positions where nothing that was asked for fits
        (2, 1, [2], "16, 64, 512"),
    ],
)
def test_contexts_that_a_model_has_positions_for(
    limit: int | None, room: int, fitting: list[int], dropped: str
) -> None:
    found = Measurement()
    assert fitting_contexts(found, limit, (16, 64, 512), room) == fitting
    told = f"Speed at {dropped} tokens is not measured: the model has {limit} positions."
    assert found.notes == ([told] if dropped else [])
