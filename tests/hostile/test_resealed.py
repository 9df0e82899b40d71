"""A finished folder that was edited, with every digest and key written anew: verify sees what no digest can."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from nbl_export import api
from nbl_export.errors import InputError
from tests.finished import QUICK
from tests.scripted import script


def sealed(out: Path) -> None:
    """Forget the verification, and make every digest and key that of what is there."""
    path = out / "nbl" / "workspace.json"
    state = json.loads(path.read_text())
    state["stages"].pop("verify", None)
    path.write_text(json.dumps(state))
    script("mutants").seal(out)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def swap_ids(tokenizer: Any) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, dict):
        a, b = list(vocabulary)[300:302]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    else:
        vocabulary[300], vocabulary[301] = vocabulary[301], vocabulary[300]


def test_a_folder_that_was_only_sealed_again_passes(stories_copy: Path) -> None:
    sealed(stories_copy)
    assert api.verify(stories_copy, QUICK).passed


@pytest.mark.parametrize("places", [("",), ("", "baseline")])
def test_another_vocabulary(stories_copy: Path, places: tuple[str, ...]) -> None:
    for place in places:
        edit(stories_copy / place / "tokenizer.json", swap_ids)
    sealed(stories_copy)
    words = "is not the model's tokenizer: run" if len(places) == 2 else "is not what `rewrite` writes: run"
    with pytest.raises(InputError, match=words):
        api.verify(stories_copy, QUICK)


def test_a_tokenizer_that_is_none(stories_copy: Path) -> None:
    (stories_copy / "baseline" / "tokenizer.json").write_text("[]")
    sealed(stories_copy)
    with pytest.raises(InputError, match=r"tokenizer\.json is not the model's tokenizer"):
        api.verify(stories_copy, QUICK)


def test_other_stop_tokens(stories_copy: Path) -> None:
    edit(stories_copy / "genai_config.json", lambda value: value["model"].update(eos_token_id=7))
    sealed(stories_copy)
    with pytest.raises(InputError, match=r"genai_config\.json is not what `rewrite` writes"):
        api.verify(stories_copy, QUICK)


def clip_positions(graph: onnx.GraphProto) -> None:
    """Beyond the prompts of parity."""
    graph.initializer.append(numpy_helper.from_array(np.array(100), "last"))
    for node in graph.node:
        node.input[:] = ["clipped" if name == "position_ids" else name for name in node.input]
    graph.node.insert(0, onnx.helper.make_node("Min", ["position_ids", "last"], ["clipped"]))


def other_embedding(graph: onnx.GraphProto) -> None:
    """Of the two tokens that held-out text is least likely to have."""
    (gather,) = [n for n in graph.node if n.op_type == "Gather" and "input_ids" in n.input]
    at = list(gather.input).index("input_ids")
    graph.initializer.append(numpy_helper.from_array(np.array([260]), "rare"))
    graph.initializer.append(numpy_helper.from_array(np.array([261]), "other"))
    gather.input[at] = "replaced"
    position = list(graph.node).index(gather)
    graph.node.insert(
        position, onnx.helper.make_node("Where", ["is_rare", "other", "input_ids"], ["replaced"])
    )
    graph.node.insert(position, onnx.helper.make_node("Equal", ["input_ids", "rare"], ["is_rare"]))


@pytest.mark.parametrize("change", [clip_positions, other_embedding])
def test_a_graph_that_differs_where_no_run_looks(
    stories_copy: Path, change: Callable[[onnx.GraphProto], None]
) -> None:
    path = stories_copy / "model.onnx"
    proto = onnx.load(str(path), load_external_data=False)
    change(proto.graph)
    path.write_bytes(proto.SerializeToString())
    sealed(stories_copy)
    report = api.verify(stories_copy, QUICK)
    (parity,) = [check for check in report.checks if check.name == "parity"]
    assert (
        not report.passed and "the graph is not what the rewrite makes of the unmodified one" in parity.detail
    )


def test_a_verdict_that_came_with_the_folder_is_not_taken(stories_copy: Path) -> None:
    """Its record fits the graph; `--again` measures all the same."""
    path = stories_copy / "report" / "report.json"
    graph = stories_copy / "model.onnx"
    proto = onnx.load(str(graph), load_external_data=False)
    clip_positions(proto.graph)
    graph.write_bytes(proto.SerializeToString())
    sealed(stories_copy)
    assert not api.verify(stories_copy, QUICK).passed
    edit(path, lambda report: [check.update(status="passed") for check in report["checks"]])
    script("mutants").seal(stories_copy)
    assert api.verify(stories_copy, QUICK).passed
    assert not api.verify(stories_copy, QUICK, again=True).passed


@pytest.mark.parametrize(
    ("stage", "name", "value"),
    [
        ("calibrate", "sources", 8),
        ("calibrate", "sources", [8]),
        ("calibrate", "seed", "8"),
        ("export", "precision", None),
        ("export", "kv_cache", 8),
        ("export", "opset", [8]),
    ],
)
def test_what_was_asked_of_a_stage_has_another_type(
    stories_copy: Path, stage: str, name: str, value: Any
) -> None:
    """``None`` drops the setting, which has no default."""

    def change(state: Any) -> None:
        settings = state["stages"][stage]["settings"]
        settings[name] = value
        if value is None:
            del settings[name]

    edit(stories_copy / "nbl" / "workspace.json", change)
    sealed(stories_copy)
    words = rf"what was asked of stage {stage} in .* is damaged \(.*: run `nbl-export {stage}` again"
    with pytest.raises(InputError, match=words):
        api.verify(stories_copy, QUICK)
