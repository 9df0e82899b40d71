"""Logits after a text that grows are those of PyTorch for the whole text, and only what is new is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.export.forms import FORMS
from nbl_export.export.torch import export_torch
from nbl_export.generate import reader as module
from nbl_export.generate.reader import Reader, StreamRow
from nbl_export.runtime.ort import ort_stream
from tests.exporters import GRAPH, Graphs
from tests.fixtures_graph import load

FAMILY, VOCAB, POSITIONS = "llama-gqa", 260, 256
FORMS_OF_CACHE = ("ours-concat", "ours-static", "ours-shared", "whole")
TEXT = [int(t) for t in np.random.default_rng(0).integers(3, VOCAB, 90)]


@pytest.fixture(scope="module")
def model(model_of: Callable[[str], Path]) -> Any:
    return load(model_of(FAMILY))


@pytest.fixture(scope="module")
def path_of(graphs: Graphs, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    whole = tmp_path_factory.mktemp("whole") / GRAPH

    def path(form: str) -> Path:
        if form != "whole":
            return graphs(form, FAMILY) / GRAPH
        if not whole.exists():
            export_torch(model, whole, form=FORMS["none"])
        return whole

    return path


def check(model: Any, logits: Any, tokens: list[int]) -> None:
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].numpy()
    assert np.abs(logits - expected).max() < 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("form", FORMS_OF_CACHE)
def test_a_text_that_grows_is_read_once(model: Any, path_of: Callable[[str], Path], form: str) -> None:
    reader = Reader(StreamRow(ort_stream(path_of(form), 1), VOCAB), POSITIONS)
    cached = form != "whole"
    check(model, reader.read(TEXT[:20], more=30), TEXT[:20])
    assert reader.ran == 20
    check(model, reader.add(TEXT[20]), TEXT[:21])
    check(model, reader.add(TEXT[21]), TEXT[:22])
    assert reader.ran == 22
    check(model, reader.read(TEXT[:40]), TEXT[:40])  # the next message
    assert reader.ran == (40 if cached else 62)
    check(model, reader.add(TEXT[40]), TEXT[:41])


@pytest.mark.parametrize("form", FORMS_OF_CACHE)
@pytest.mark.parametrize("other", ["another beginning", "shorter", "the same"])
def test_a_text_that_is_written_anew_is_read_anew(
    model: Any, path_of: Callable[[str], Path], form: str, other: str
) -> None:
    reader = Reader(StreamRow(ort_stream(path_of(form), 1), VOCAB), POSITIONS)
    reader.read(TEXT[:20])
    again = {"another beginning": [5, *TEXT[1:30]], "shorter": TEXT[:12], "the same": TEXT[:20]}[other]
    check(model, reader.read(again), again)
    assert reader.ran == 20 + len(again)
    check(model, reader.add(7), [*again, 7])


@pytest.mark.parametrize("form", FORMS_OF_CACHE)
def test_a_cache_of_fixed_length_gets_more_room(
    model: Any, path_of: Callable[[str], Path], form: str
) -> None:
    reader = Reader(StreamRow(ort_stream(path_of(form), 1), VOCAB), POSITIONS)
    reader.read(TEXT[:10], more=2)
    for at in range(10, 60):
        check(model, reader.add(TEXT[at]), TEXT[: at + 1])
    # 10, again at 13, and then each time that the text has doubled.
    assert reader.ran == (60 if form != "ours-static" else 60 + 12 + 24 + 48)
    check(model, reader.read(TEXT), TEXT)


def test_no_room_is_asked_for_beyond_the_positions(model: Any, path_of: Callable[[str], Path]) -> None:
    stream: Any = ort_stream(path_of("ours-static"), 1)
    reader = Reader(StreamRow(stream, VOCAB), 32)
    reader.read(TEXT[:20], more=500)
    assert stream.capacity == 32


@pytest.mark.parametrize("form", FORMS_OF_CACHE)
def test_after_an_interrupted_pass_all_is_read_again(
    model: Any, path_of: Callable[[str], Path], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = StreamRow(ort_stream(path_of(form), 1), VOCAB)
    reader = Reader(row, POSITIONS)
    reader.read(TEXT[:20], more=40)
    going = row.go_on

    def interrupted(tokens: Any) -> Any:
        going(tokens)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(row, "go_on", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reader.add(TEXT[20])
    check(model, reader.read(TEXT[:30]), TEXT[:30])
    assert reader.ran == 20 + 30


@pytest.mark.parametrize("form", ["ours-concat", "ours-static", "ours-shared"])
def test_a_long_text_is_read_in_passes(
    model: Any, path_of: Callable[[str], Path], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Few:
        def __init__(self, *_: Any) -> None:
            self.tokens = 7

    monkeypatch.setattr(module, "Limits", Few)
    reader = Reader(StreamRow(ort_stream(path_of(form), 1), VOCAB), POSITIONS)
    check(model, reader.read(TEXT[:30], more=60), TEXT[:30])
    check(model, reader.read(TEXT), TEXT)
    assert reader.ran == len(TEXT)
