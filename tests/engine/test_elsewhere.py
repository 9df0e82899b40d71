"""What trtexec and Polygraphy are given is what we build: the same shapes, and a graph that they take as it stands."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.engine.elsewhere import fixed_path, write_for_others
from nbl_export.engine.library import Library
from nbl_export.engine.manifest import load_manifest
from nbl_export.engine.network import parse_network
from nbl_export.graph.io import load_graph
from tests.graph.external_data import resolved

GRAPHS = {"model": "model.onnx", "baseline": "baseline/model.onnx"}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_fixed_graph_is_the_same_with_a_length(built_out: Path, rtx: Library, name: str) -> None:
    graph = built_out / GRAPHS[name]
    fixed = fixed_path(graph)
    ours, theirs = (resolved(path).graph for path in (graph, fixed))
    assert (ours.node, ours.initializer) == (theirs.node, theirs.initializer)
    assert fixed.stat().st_size < 2 * graph.stat().st_size, "its weights are those of the other"
    shapes = {v.name: v.shape for v in load_graph(fixed).graph.inputs if v.shape is not None}
    cache = [shape for one, shape in shapes.items() if "past" in str(one)]
    assert cache and {shape[2] for shape in cache} == {256}
    assert parse_network(rtx, fixed).network.num_inputs == len(shapes), "TensorRT reads it as it stands"


@pytest.mark.parametrize("name", GRAPHS)
def test_trtexec_is_told_both_profiles(built_out: Path, tmp_path: Path, name: str) -> None:
    fake = tmp_path / "trtexec"
    fake.write_text('#!/bin/sh\npwd\nfor one in "$@"; do echo "$one"; done\n')
    fake.chmod(0o755)
    script = built_out / "engine" / f"{name}.trtexec.sh"
    paths = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["sh", script, "--verbose"], capture_output=True, text=True, env=paths, check=True)
    where, *told = done.stdout.splitlines()
    onnx = next(one.removeprefix("--onnx=") for one in told if one.startswith("--onnx="))
    assert (Path(where) / onnx).resolve() == fixed_path(built_out / GRAPHS[name]).resolve()
    assert told[1] == "--stronglyTyped" and told[-1] == "--verbose"
    profiles = load_manifest(built_out / "engine" / f"{name}.engine").profiles
    at = [told.index(f"--profile={n}") for n in range(len(profiles))]
    for profile, begun in zip(profiles, at, strict=True):
        for which, place in (("min", 0), ("opt", 1), ("max", 2)):
            line = told[begun + 1 + place]
            assert line.startswith(f"--{which}Shapes=")
            shapes = dict(one.split(":") for one in line.partition("=")[2].split(","))
            assert {n: tuple(map(int, s.split("x"))) for n, s in shapes.items()} == {
                n: s[place] for n, s in profile.shapes.items()
            }


def test_rows_are_a_prefill_and_a_step_after_it(built_out: Path) -> None:
    loaded: Any = runpy.run_path(str(built_out / "engine" / "model_rows.py"))
    prefill, step = loaded["load_data"]()
    assert prefill["input_ids"].shape == (1, 64) and step["input_ids"].shape == (1, 1)
    assert np.array_equal(prefill["position_ids"][0], np.arange(64)) and step["position_ids"] == [[128]]
    assert prefill["write_indices"] == [0] and step["write_indices"] == [128]
    assert {a.dtype.name for n, a in prefill.items() if "past" in n} == {"float16"}


def test_polygraphy_runs_the_graph_with_those_rows(built_copy: Path) -> None:
    """It imports the rows as a module, which Python compiles beside them."""
    tool = shutil.which("polygraphy", path=str(Path(sys.executable).parent))
    if tool is None:
        pytest.skip("needs polygraphy")
    rows = str(built_copy / "engine" / "model_rows.py")
    command = [tool, "run", str(built_copy / "model.fixed.onnx"), "--onnxrt", "--data-loader-script", rows]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_cache_that_grows_needs_no_other_graph(built_copy: Path) -> None:
    from dataclasses import replace

    engine = built_copy / "engine" / "model.engine"
    manifest = replace(load_manifest(engine), kv_cache="concat")
    (built_copy / "model.fixed.onnx").unlink()
    files = write_for_others(built_copy / "model.onnx", engine, manifest)
    assert [path.name for path in files] == ["model.trtexec.sh", "model_rows.py"]
    assert "--onnx=../model.onnx" in files[0].read_text() and not (built_copy / "model.fixed.onnx").exists()
