"""What is verified: rows of held-out text by hand, and what a graph says of itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from nbl_export.calibrate.text import CalibrationText
from nbl_export.graph.rounding import UNTIMED
from nbl_export.progress import Silent
from nbl_export.settings import VerifySettings
from nbl_export.verify.case import DecoderCase
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


def test_a_text_too_short_is_read_again() -> None:
    (row, other) = case([[5, 6, 7]], (), decode_steps=1).rows((4, 1))
    assert row.tolist() == [5, 6, 7, 5, 6] and other.tolist() == [7, 5]


def test_both_graphs_go_by_their_role() -> None:
    both = replace(case(), baseline=Path("a"), rewritten=Path("b"))
    assert both.graphs == {"base": Path("a"), "linearized": Path("b")}


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


def test_the_graph_is_read_once_and_its_weights_stay_on_disk(graphs: Graphs) -> None:
    found = case(path=graphs("concat", "fp32", (0, 3)))
    assert found.graph is found.graph
    large = [v.const_value for v in found.graph.graph.initializers.values() if v.const_value.size > 1000]  # type: ignore[union-attr]
    assert large and all(isinstance(value, ir.ExternalTensor) for value in large)
