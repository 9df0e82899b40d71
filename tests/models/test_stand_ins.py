"""Tensors that stand for weights take no room, and are gone afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.stand_ins import standing_in
from tests.models.test_weights import absent, plain, stored_in
from tests.tiny import build as build_tiny

# Numbers of a matrix that is worth a stand-in here.
LARGE = 1025


def test_what_stands_for_a_weight_takes_no_memory_and_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbl_export.models.stand_ins._LARGE", 4 * LARGE)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    model = load_model(find_model(str(stored_in(build_tiny(tmp_path / "m"), torch.bfloat16))))
    with standing_in(model) as found:
        assert {one.tensor.shape for one in found} == {
            p.shape for p in model.parameters() if p.numel() >= LARGE
        }
        assert not absent(model) and all(not one.tensor.any() for one in found)
        used = [path.stat() for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
        assert len(used) == len(found) and sum(s.st_size for s in used) == sum(
            one.tensor.nbytes for one in found
        )
        assert sum(512 * s.st_blocks for s in used) <= 4096 * len(used)
        for one in found:
            assert torch.equal(one.read(), one.stored().float())
    assert absent(model) and list((tmp_path / "scratch").iterdir()) == []
    with standing_in(plain(tmp_path / "m")) as found:
        assert found == []


def test_what_is_small_is_read_and_an_error_leaves_nothing(tmp_path: Path) -> None:
    model = load_model(find_model(str(stored_in(build_tiny(tmp_path / "m"), torch.bfloat16))))
    before = absent(model)
    with pytest.raises(ZeroDivisionError), standing_in(model) as found:
        assert found == [], "every matrix is small"
        theirs = dict(plain(tmp_path / "m").named_parameters())
        assert all(torch.equal(p, theirs[name]) for name, p in model.named_parameters())
        raise ZeroDivisionError
    assert absent(model) == before
