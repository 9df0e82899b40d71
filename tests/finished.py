"""Finished runs on stories260K: what was asked and is recorded, one to talk with, the baseline in every precision."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from nbl_export import api
from nbl_export.export.torch import save_in_precision
from nbl_export.files import sha256_of_file
from nbl_export.graph.io import load_graph
from nbl_export.graph.precision import precision_of
from nbl_export.models.load import LoadedModel
from nbl_export.models.source import same_model
from nbl_export.progress import Listener, Silent
from nbl_export.stages.run import Run
from nbl_export.workspace import Workspace
from tests.exporters import GRAPH, Export, quantized_by_ort
from tests.rewrite.by_hand import baseline, prompts

VERIFY = api.VerifySettings(contexts=(16,), rounds=3)
# What the finished run was asked for.
TWO = api.SelectSettings(k=2, criterion="cca")
QUICK = api.VerifySettings(quality=False, speed=False)


def state(out: Path) -> Any:
    return json.loads((out / "nbl" / "workspace.json").read_text())["stages"]


def times(out: Path) -> dict[str, int]:
    """Modification times of all files but the lock and what the workspace writes down for itself."""
    own = (".lock", "workspace.json", "digests.json")
    files = [p for p in out.rglob("*") if p.is_file() and p.name not in own]
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in files}


def assert_same(found: Path, expected: Path) -> None:
    """Two files of equal content. A safetensors file's arrays: the order of its metadata is not fixed."""
    if found.suffix != ".safetensors":
        assert sha256_of_file(found) == sha256_of_file(expected), found.name
        return
    a, b = load_file(found), load_file(expected)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a), found.name


def resumed(out: Path, listener: Listener | None = None) -> Run:
    """A run that goes on in ``out``, without its lock."""
    workspace, heard = Workspace.open(out), listener or Silent()
    source = same_model(workspace.model_info or {})
    workspace.found_model(source.as_json())
    return Run(workspace, LoadedModel(source, heard), heard)


# The start token, and an end after each answer: what was said before stays as it was read.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'system' %}{{ '\\n' }}"
    "{% elif m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
START, END, OTHER_END = 1, 2, 511


@pytest.fixture(scope="session")
def talking_out(stories_folder: Path, stories_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported and rewritten; copy it before changing it."""
    from nbl_export import api

    place = tmp_path_factory.mktemp("talking")
    model = Path(shutil.copytree(stories_folder, place / "model"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, OTHER_END]}))
    out = place / "out"
    text = api.CalibrateSettings((str(stories_text),), samples=8, seq_len=64, heldout_samples=4)
    api.calibrate(model, out, text)
    api.select(out, api.SelectSettings(layers=(1, 3)))
    api.export(out)
    api.rewrite(out)
    shutil.rmtree(model)  # the folder is enough
    return out


@pytest.fixture
def talking_copy(talking_out: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(talking_out, tmp_path / "out", copy_function=shutil.copy2))


# onnxruntime runs GroupQueryAttention of this model's head size nowhere on the CPU, so the graphs are not of genai.
QUANTIZERS: Mapping[str, Export] = {
    "int8": quantized_by_ort(as_operator=True, bits=8),
    "int4": quantized_by_ort(as_operator=True),
    "int4-qdq": quantized_by_ort(as_operator=False),
}
PRECISIONS = ("fp32", "fp16", "bf16", *QUANTIZERS)


def made(out: Path, name: str, folder: Path) -> Path:
    """The baseline of the run ``out`` in the precision ``name``, written into ``folder``."""
    source = baseline(out)
    if name == "fp32":
        return source
    folder.mkdir(parents=True)
    if name in QUANTIZERS:
        QUANTIZERS[name](source.parent, folder)
    else:
        rows = prompts(out, (60, 40)) if name == "fp16" else []
        save_in_precision(load_graph(source), folder / GRAPH, precision_of(name), rows)
    return folder / GRAPH


@pytest.fixture(scope="session")
def baseline_in(stories_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The baseline by the name of its precision; read only."""
    root = tmp_path_factory.mktemp("precisions")
    return cache(lambda name: made(stories_out, name, root / name))
