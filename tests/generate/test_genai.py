"""onnxruntime-genai gives the logits of our own loop, and is not given a configuration that asks for more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.generate.genai import GenaiRow, has_config, why_not
from nbl_export.generate.reader import Reader, StreamRow
from nbl_export.runtime.ort import ort_stream
from tests.exporters import GRAPH, Graphs
from tests.genai_config import change

NAME = "genai_config.json"
PROMPT = [1, 403, 407, 261, 378]


@pytest.fixture
def installed() -> None:
    pytest.importorskip(
        "onnxruntime_genai", reason="needs onnxruntime-genai: pip install 'nbl-export[genai]'"
    )


@pytest.mark.client
@pytest.mark.parametrize("cache", ["concat", "shared"])
def test_its_logits_are_those_of_our_loop(installed: None, stories_copy: Path, cache: str) -> None:
    if cache != "concat":
        api.export(stories_copy, api.ExportSettings(kv_cache=cache))
        api.rewrite(stories_copy)
    for path in (stories_copy / "baseline" / GRAPH, stories_copy / GRAPH):
        assert why_not(path) is None
        row = GenaiRow(path)
        assert row.positions == 512 and row.grows is (cache == "concat")
        one, other = Reader(row, 512), Reader(StreamRow(ort_stream(path, 1), 512), 512)
        text, tokens = list(PROMPT), []
        for turn in range(3):
            logits = [each.read(text, more=4) for each in (one, other)]
            for _ in range(20):
                np.testing.assert_allclose(*logits, rtol=0, atol=1e-3)
                tokens.append(int(logits[0].argmax()))
                assert tokens[-1] == int(logits[1].argmax())
                text.append(tokens[-1])
                logits = [each.add(tokens[-1]) for each in (one, other)]
            text += [2, 1, 403, 407 + turn]  # a stop token in the middle is a token like others
        assert len(set(tokens)) > 10


@pytest.mark.client
def test_folders_of_its_own_builder_can_be_given_to_it(installed: None, graphs: Graphs) -> None:
    path = graphs("genai-int4", "llama-gqa") / GRAPH
    assert why_not(path) is None
    assert GenaiRow(path).begin(list(range(40, 50)), 64).shape == (260,)


@pytest.mark.client
def test_what_it_does_not_load_is_one_sentence(installed: None, stories_copy: Path) -> None:
    change(stories_copy, lambda c: c["model"].update(type="no such type"))
    with pytest.raises(
        InputError, match=r"^onnxruntime-genai does not load .*model\.onnx: .*no such type.*\.$"
    ):
        GenaiRow(stories_copy / GRAPH)


def in_session(**more: Any) -> Callable[[Any], object]:
    return lambda c: c["model"]["decoder"]["session_options"].update(more)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "a library": (
        in_session(custom_ops_library="/tmp/evil.so"),
        "has 'custom_ops_library', which is more than",
    ),
    "a provider": (in_session(provider_options=[{"cuda": {}}]), "asks for another execution provider"),
    "a pipeline": (lambda c: c["model"]["decoder"].update(pipeline=[]), "has 'pipeline'"),
    "options of a run": (lambda c: c["model"]["decoder"].update(run_options={}), "has 'run_options'"),
    "an encoder": (lambda c: c["model"].update(encoder={"filename": "../x"}), "has 'encoder'"),
    "an engine": (lambda c: c.update(engine={}), "has 'engine'"),
    "another file": (lambda c: c["model"]["decoder"].update(filename="../x.onnx"), "names another graph"),
    "no decoder": (lambda c: c["model"].pop("decoder"), "is no configuration of a decoder"),
    "no buffer": (lambda c: c.pop("search"), "is no configuration of a decoder"),
    "a length in words": (
        lambda c: c["model"].update(context_length="9"),
        "is no configuration of a decoder",
    ),
    "options in words": (lambda c: c["model"]["decoder"].update(session_options="x"), "has 'x'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_configuration_that_asks_for_more_is_not_given_to_it(stories_copy: Path, name: str) -> None:
    how, why = CHANGES[name]
    change(stories_copy, how)
    assert why in str(why_not(stories_copy / GRAPH))


def test_a_folder_without_a_configuration_or_with_a_damaged_one(stories_out: Path, tmp_path: Path) -> None:
    assert "has no genai_config.json" in str(why_not(tmp_path / GRAPH)) and not has_config(tmp_path / GRAPH)
    shutil.copy(stories_out / NAME, tmp_path)
    assert why_not(tmp_path / GRAPH) is None and has_config(tmp_path / GRAPH)
    (tmp_path / NAME).write_text("{")
    assert "is damaged" in str(why_not(tmp_path / GRAPH))
    (tmp_path / NAME).write_text("[]")
    assert "is no configuration" in str(why_not(tmp_path / GRAPH))
