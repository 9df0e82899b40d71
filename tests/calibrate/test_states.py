"""States between two blocks: in memory or in files, the same tensors, and nothing taken that was changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from nbl_export.calibrate.states import InMemory, OnDisk, States, as_array, as_tensor, states_for
from nbl_export.errors import InputError

LIKE = torch.empty(0)


def states(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["memory", "disk"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> States:
    return InMemory(2) if request.param == "memory" else OnDisk(tmp_path / "states", 2, LIKE)


def test_states_after_a_part_are_those_before_the_next(kept: States) -> None:
    assert len(kept) == 2 and kept.get(0) is None and kept.get(1) is None
    for part in range(3):
        for batch in range(2):
            kept.put(batch, states(10 * part + batch))
        kept.turn()
        for batch in range(2):
            found = kept.get(batch)
            assert found is not None and torch.equal(found, states(10 * part + batch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_bit_is_lost(tmp_path: Path, dtype: torch.dtype) -> None:
    like = torch.empty(0, dtype=dtype)
    kept = OnDisk(tmp_path, 1, like)
    special = states(0, dtype)
    special[0, 0, :4] = torch.tensor([float("inf"), -0.0, 1e-40, 3.0]).to(dtype)
    kept.put(0, special)
    kept.turn()
    found = kept.get(0)
    assert found is not None and found.dtype == dtype
    assert (
        found.numpy(force=True).tobytes() == special.numpy(force=True).tobytes()
        if dtype != torch.bfloat16
        else True
    )
    assert torch.equal(found.view(torch.uint8), special.view(torch.uint8))
    assert torch.equal(as_tensor(as_array(special), like), special)


def test_what_a_checkpoint_names_is_not_overwritten_within_the_part(tmp_path: Path) -> None:
    """A run that is killed after it goes on from the same states."""
    first = OnDisk(tmp_path, 2, LIKE)
    for batch in range(2):
        first.put(batch, states(batch))
    first.turn()
    first.put(0, states(10))
    about = json.loads(json.dumps(first.about()))
    first.put(1, states(11))  # and is killed
    second = OnDisk(tmp_path, 2, LIKE)
    second.adopt(about)
    assert torch.equal(second.get(0), states(0)) and torch.equal(second.get(1), states(1))  # type: ignore[arg-type]
    assert torch.equal(second.after(0), states(10)) and second.after(1) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["byte", "short", "long", "gone", "folder", "side", "shape", "digest"])
def test_files_that_are_not_as_the_checkpoint_says_are_refused(tmp_path: Path, damage: str) -> None:
    kept = OnDisk(tmp_path, 1, LIKE)
    kept.put(0, states(0))
    about: Any = json.loads(json.dumps(kept.about()))
    path = tmp_path / "1.0.bin"
    raw = bytearray(path.read_bytes())
    if damage == "byte":
        raw[7] ^= 1
        path.write_bytes(raw)
    elif damage == "short":
        path.write_bytes(raw[:-4])
    elif damage == "long":
        path.write_bytes(raw + b"1234")
    elif damage in ("gone", "folder"):
        path.unlink()
        if damage == "folder":
            path.mkdir()
    elif damage == "side":
        about["side"] = 2
    elif damage == "shape":
        about["files"][1]["0"][0] = [3, 5, -8]
    else:
        about["files"][1]["0"] = "x"
    with pytest.raises((ValueError, KeyError, TypeError, OSError, InputError)):
        OnDisk(tmp_path, 1, LIKE).adopt(about)


# where they are kept ------------------------------------------------------------------------------


class Memory(NamedTuple):
    available: int


def test_they_are_in_memory_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten batches of 100 bytes, and the copy that a checkpoint is written from.
    for limit, on_disk in ((2000, False), (1999, True), (100, True)):
        assert states_for(10, 100, LIKE, tmp_path, limit).on_disk == on_disk
    for free, on_disk in ((4000, False), (3998, True)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: Memory(free))
        assert states_for(10, 100, LIKE, tmp_path, None).on_disk == on_disk


def test_less_than_one_batch_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        states_for(10, 100_001, LIKE, tmp_path, 100_000)
    assert str(caught.value) == (
        "--memory 100,000 bytes is less than the states of one batch of rows take: give 101kB or more, or lower "
        "--seq-len."
    )


def test_files_of_a_process_that_nothing_goes_on_from_go_with_it() -> None:
    kept = states_for(10, 100, LIKE, None, 100)
    kept.put(0, states(0))
    kept.turn()
    assert kept.on_disk and torch.equal(kept.get(0), states(0))  # type: ignore[arg-type]
    folder = kept._folder
    assert len(list(folder.iterdir())) == 1
    del kept
    assert not folder.exists()
