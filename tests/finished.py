"""The finished run on stories260K: what it was asked for, and what an output folder holds and records of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from nbl_export import api
from nbl_export.files import sha256_of_file
from nbl_export.models.loaded import LoadedModel
from nbl_export.models.source import same_model
from nbl_export.progress import Listener, Silent
from nbl_export.stages.run import Run
from nbl_export.workspace import Workspace

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
