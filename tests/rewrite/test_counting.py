"""What was removed is counted, and a rewrite that removed anything else is discarded."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from nbl_export.errors import BuildError
from nbl_export.graph.io import load_graph, summarize
from nbl_export.rewrite.counting import count
from nbl_export.rewrite.replace import rewrite_file
from tests.fixtures_graph import plan_by_hand
from tests.rewrite.by_hand import baseline


def test_count_refuses_what_was_not_planned(stories_out: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    result = rewrite_file(baseline(stories_out), plan_by_hand(stories_out, (1,)), path)
    count(load_graph(path), result.before, result.after, plan_by_hand(stories_out, (1,)))
    for layers in ((), (1, 2)):
        with pytest.raises(BuildError, match="attention layers, expected"):
            count(load_graph(path), result.before, result.after, plan_by_hand(stories_out, layers))
    model = load_graph(path)
    dead = onnx.helper.make_tensor("dead", onnx.TensorProto.FLOAT, [1], [0.0])
    proto = onnx.load(str(path), load_external_data=False)
    proto.graph.initializer.append(dead)
    path.write_bytes(proto.SerializeToString())
    model = load_graph(path)
    with pytest.raises(BuildError, match="1 dead initializers, expected 0"):
        count(model, result.before, summarize(model, path), plan_by_hand(stories_out, (1,)))
    with pytest.raises(BuildError, match="KV pairs, expected"):
        count(load_graph(path), result.before, result.after, plan_by_hand(stories_out, (1,)), pairs=0)
