"""Weights in files of a size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from nbl_export.convert import shards
from nbl_export.convert.shards import Shards
from nbl_export.errors import InputError


def test_weights_are_in_files_of_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SHARD", 1000)
    files = Shards(tmp_path, "float16", "pt")
    own = {f"w{i}": np.full((10, 20), i, np.float32) for i in range(5)}  # 400 bytes each
    for name, value in own.items():
        files.add(name, value)
    *paths, index = files.finish()
    assert [path.name for path in paths] == [f"model-0000{n}.safetensors" for n in (1, 2, 3)]
    raw = json.loads(index.read_text())
    assert raw["metadata"] == {"total_size": 2000}
    found = {}
    for path in paths:
        tensors = load_file(path)
        assert {name for name, place in raw["weight_map"].items() if place == path.name} == set(tensors)
        with safe_open(path, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
        found |= tensors
    assert found.keys() == own.keys()
    assert all(found[n].dtype == np.float16 and np.array_equal(found[n], own[n]) for n in own)


def test_a_number_that_the_dtype_does_not_have_is_refused(tmp_path: Path) -> None:
    files = Shards(tmp_path, "float16", "pt")
    with pytest.raises(InputError, match="w has numbers that float16 does not have: use --precision bf16"):
        files.add("w", np.array([1e6], np.float32))
    assert not list(tmp_path.iterdir())
