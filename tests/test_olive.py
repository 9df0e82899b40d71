"""Olive itself runs its workflow with our pass: alone, and before one of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from nbl_export import api

pytest.importorskip("olive", reason="needs olive-ai: pip install 'nbl-export[olive]'")
QUICK = ["--samples", "24", "--heldout-samples", "4", "--criterion", "cca", "--no-speed"]


def workflow(model: Path, text: Path, root: Path, *options: str, then: str = "") -> dict[str, Any]:
    told = [*options, "--calibration", str(text), *QUICK]
    passes = {"linearize": {"type": "NeuralBlockLinearization", "options": told}}
    return {
        "input_model": {"type": "HfModel", "model_path": str(model)},
        "passes": passes | ({"then": {"type": then}} if then else {}),
        "output_dir": str(root / "out"),
        "cache_dir": str(root / "cache"),
    }


def run(asked: dict[str, Any]) -> Any:
    from olive.workflows import run

    from nbl_export.olive import package_config

    return run(asked, package_config=package_config())


@pytest.mark.client
def test_its_output_is_a_package_that_is_verified(
    stories_folder: Path, stories_text: Path, tmp_path: Path
) -> None:
    run(workflow(stories_folder, stories_text, tmp_path, "--k", "2"))
    out = tmp_path / "out"
    assert {"model.onnx", "genai_config.json", "tokenizer.json", "README.md"} <= {
        path.name for path in out.iterdir()
    }
    assert api.verify_package(out, stories_folder).passed
    handled = json.loads((out / "model_config.json").read_text())
    assert handled["type"].lower() == "onnxmodel"
    assert not list(tmp_path.rglob(".nbl.*"))


@pytest.mark.client
def test_a_pass_of_olive_goes_on_with_it(stories_folder: Path, stories_text: Path, tmp_path: Path) -> None:
    asked = workflow(stories_folder, stories_text, tmp_path, "--k", "2", then="OnnxBlockWiseRtnQuantization")
    run(asked)
    out = tmp_path / "out"
    graph = onnx.load(str(out / "model.onnx")).graph
    assert "MatMulNBits" in {node.op_type for node in graph.node}
    assert len([i for i in graph.input if i.name.startswith("past_key_values.")]) == 2 * 3
    # What generates with it is there; what is said of another graph is not.
    there = {path.name for path in out.iterdir()}
    assert {"genai_config.json", "tokenizer.json"} <= there and not {"package.json", "report"} & there


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--k", "99"], "`nbl-export run` ended with exit code 2: --k is 99"),
    ],
)
def test_what_nbl_export_refuses_fails_the_pass(
    stories_folder: Path,
    stories_text: Path,
    tmp_path: Path,
    options: list[str],
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Olive says why, and ends without a model."""
    run(workflow(stories_folder, stories_text, tmp_path, *options))
    assert re.search(said, caplog.text)
    assert not list(tmp_path.rglob("model.onnx")) and not list(tmp_path.rglob(".nbl.*"))


def test_a_graph_is_no_model_to_calibrate(
    stories_out: Path, stories_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = workflow(stories_out, stories_text, tmp_path, "--k", "2")
    asked["input_model"] = {"type": "ONNXModel", "model_path": str(stories_out / "model.onnx")}
    run(asked)
    assert "NeuralBlockLinearization takes a HfModel" in caplog.text


def test_the_passes_are_written_to_a_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nbl_export.olive"]
    done = subprocess.run([*command, str(tmp_path / "p.json")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    passes = json.loads((tmp_path / "p.json").read_text())["passes"]
    assert passes["NeuralBlockLinearization"]["module_path"] == "nbl_export.olive.NeuralBlockLinearization"
    assert len(passes) > 10
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: Say where to write")
