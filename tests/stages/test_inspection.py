"""`inspect`: what its tables say is counted a second time with onnx, safetensors and json alone."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from nbl_export import __version__
from nbl_export.errors import InputError
from nbl_export.linearize.plan import load_plan
from nbl_export.report.drawing import Table
from nbl_export.stages.inspection import inspect


def as_dict(table: Table) -> dict[str, str]:
    return {row[0]: row[1] for row in table.rows}


@pytest.mark.parametrize("name", ["model.onnx", "baseline/model.onnx"])
def test_a_graph_is_counted(stories_out: Path, name: str) -> None:
    path = stories_out / name
    facts, ops, attention = inspect(path)
    proto = onnx.load(str(path))
    said = as_dict(facts)
    sizes = [path.stat().st_size, path.with_name(path.name + ".data").stat().st_size]
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place.get("location") == "baseline/model.onnx.data":
            sizes.append(int(place["length"]))
    assert said["size on disk"] == f"{sum(sizes) / 2**20:,.1f} MiB"
    weights = {t.name: int(np.prod(t.dims)) for t in proto.graph.initializer}
    assert said["parameters"] == f"{sum(weights.values()):,}"
    assert said["nodes"] == f"{len(proto.graph.node):,}"
    assert said["inputs / outputs"] == f"{len(proto.graph.input)} / {len(proto.graph.output)}"
    pairs = sum(i.name.startswith("past_key_values.") for i in proto.graph.input) // 2
    assert said["KV pairs"] == str(pairs) == {"model.onnx": "3", "baseline/model.onnx": "5"}[name]
    assert said["rewritten by nbl-export"] == {"model.onnx": "yes", "baseline/model.onnx": "no"}[name]
    counted = Counter(node.op_type for node in proto.graph.node)
    assert {op.split("::")[-1]: int(n.replace(",", "")) for op, n in as_dict(ops).items()} == counted
    assert [row[0] for row in attention.rows] == ["0", "1", "2", "3", "4"]
    assert said["producer"] == f"nbl-export {__version__}"


def test_attention_that_is_gone_is_called_linear(stories_out: Path) -> None:
    chosen = load_plan(stories_out / "nbl" / "plan.json").chosen
    *_, attention = inspect(stories_out / "model.onnx")
    linear = {int(row[0]) for row in attention.rows if row[1] == "linear"}
    assert linear == set(chosen) and len(linear) == 2
    left = [row for row in attention.rows if row[1] != "linear"]
    # Pairs are numbered anew, layers keep their numbers.
    assert [row[3] for row in left] == [f"past_key_values.{i}.key" for i in range(3)]
    assert all(row[2] == "float" and row[4] == "yes" for row in left)


def test_a_plan_and_moments_are_read_back(stories_out: Path) -> None:
    (plan,) = inspect(stories_out / "nbl" / "plan.json")
    raw = json.loads((stories_out / "nbl" / "plan.json").read_text())
    said = as_dict(plan)
    assert said["criterion"] == "cca" and said["layers"] == "5" and said["hidden size"] == "64"
    assert said["model fingerprint"] == raw["model"][:16]
    assert said == as_dict(inspect(stories_out / "nbl" / "plan.safetensors")[0])
    folder = stories_out / "nbl" / "moments"
    (moments,) = inspect(folder)
    (one,) = inspect(folder / "003.safetensors")
    assert one.rows == moments.rows[3:4] and [row[0] for row in moments.rows] == list("01234")
    for row in moments.rows:
        layer, tokens, *energies = row
        sums: dict[str, Any] = load_file(folder / f"00{layer}.safetensors")
        n = int(tokens.replace(",", ""))
        assert n == 32 * 128
        diagonal = np.cumsum(np.arange(1, 65)) - 1  # of a lower triangle, row after row
        for text, name in zip(energies, ("xx", "hh", "yy"), strict=True):
            assert float(text) == pytest.approx(sums[name][diagonal].sum() / n, rel=1e-3)


def test_a_folder_lists_its_stages(stories_copy: Path) -> None:
    stages, *others = inspect(stories_copy)
    state = {row[0]: row[1] for row in stages.rows}
    assert state == {
        **dict.fromkeys(("calibrate", "select", "export", "rewrite", "verify"), "done"),
        **dict.fromkeys(("build", "eval", "bench", "convert"), "not yet"),
    }
    assert len(others) == 2
    (stories_copy / "model.onnx.data").write_bytes(b"damaged")
    state = {row[0]: row[1] for row in inspect(stories_copy)[0].rows}
    assert state["rewrite"] == "damaged: model.onnx.data" and state["export"] == "done"


@pytest.mark.parametrize("name", ["x.txt", "x.json", "x.safetensors", "x.engine", "x.onnx", "missing.onnx"])
def test_what_is_none_of_these_is_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    if name != "missing.onnx":
        (tmp_path / name).write_text('{"format": "of somebody else"}')
    with pytest.raises(InputError) as told:
        inspect(tmp_path / name)
    assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)
