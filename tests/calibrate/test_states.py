"""States between two blocks: in memory, in files, of several processes, and nothing taken that was changed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch

from nbl_export.calibrate.states import InMemory, OnDisk, RankStates, States, as_array, as_tensor, states_for
from nbl_export.checkpoint import Checkpoint
from nbl_export.errors import InputError
from nbl_export.ranks import ALONE, Ranks
from tests.several import forked

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


def test_files_that_are_not_as_the_checkpoint_says_are_refused(tmp_path: Path) -> None:
    kept = OnDisk(tmp_path, 1, LIKE)
    kept.put(0, states(0))
    about: Any = json.loads(json.dumps(kept.about()))
    path = tmp_path / "1.0.bin"
    raw = path.read_bytes()
    OnDisk(tmp_path, 1, LIKE).adopt(about)
    for content in (raw[:7] + bytes([raw[7] ^ 1]) + raw[8:], raw[:-4], raw + b"1234", None):
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        with pytest.raises((ValueError, OSError, InputError)):
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


# of several processes -----------------------------------------------------------------------------


OURS = {"model": "ours"}
BATCHES = 5


def of_ranks(folder: Path, ranks: Ranks = ALONE, identity: Any = OURS, every: float = 0.0) -> RankStates:
    return RankStates(Checkpoint(folder / "partial" / "states.safetensors", every), ranks, identity)


def arrays(part: int, batches: Any) -> dict[int, np.ndarray]:
    return {batch: np.full((2, 3), 100 * part + batch, np.float32) for batch in batches}


def saved(folder: Path, count: int, *parts: int, **how: Any) -> None:
    def work(ranks: Ranks) -> None:
        kept = of_ranks(folder, ranks, **how)
        for part in parts:
            kept.save(part, partial(arrays, part, ranks.mine(range(BATCHES))))

    assert forked(count, folder / "results", work) == [None] * count


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "partial").glob("*"))


@pytest.mark.parametrize("count", [2, 3, 7])  # of seven, two have none
def test_any_number_of_processes_finds_the_latest(tmp_path: Path, count: int) -> None:
    saved(tmp_path, count, 1, 2)
    assert names(tmp_path) == [f"states.002.{rank}-of-{count}.safetensors" for rank in range(count)]

    def work(ranks: Ranks) -> Any:
        kept = of_ranks(tmp_path, ranks)
        found = kept.find(BATCHES)
        assert found is not None
        part, files = found
        mine = list(ranks.mine(range(BATCHES)))
        return part, {batch: array.tolist() for batch, array in kept.load(files, mine).items()}

    for then in (1, 2, 4):
        results = forked(then, tmp_path / "found", work)
        whole = {batch: array for _, some in results for batch, array in some.items()}
        assert {part for part, _ in results} == {2}
        assert whole == {batch: array.tolist() for batch, array in arrays(2, range(BATCHES)).items()}


def test_what_is_older_goes(tmp_path: Path) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "states.safetensors").write_bytes(b"of one process")
    (tmp_path / "partial" / "000.safetensors").write_bytes(b"moments")
    saved(tmp_path, 3, 1)
    saved(tmp_path, 2, 3)
    assert names(tmp_path) == [
        "000.safetensors",
        "states.003.0-of-2.safetensors",
        "states.003.1-of-2.safetensors",
    ]


def test_half_of_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    saved(tmp_path, 2, 1)
    before = {name: (tmp_path / "partial" / name).read_bytes() for name in names(tmp_path)}
    saved(tmp_path, 2, 2)
    (tmp_path / "partial" / "states.002.1-of-2.safetensors").unlink()
    for name, content in before.items():
        (tmp_path / "partial" / name).write_bytes(content)
    found = of_ranks(tmp_path).find(BATCHES)
    assert found is not None and found[0] == 1


@pytest.mark.parametrize("how", ["a changed bit", "of another model", "of fewer batches"])
def test_what_is_damaged_or_of_others_is_not_found(tmp_path: Path, how: str) -> None:
    saved(tmp_path, 2, 1, identity={"model": "theirs"} if how == "of another model" else OURS)
    path = tmp_path / "partial" / "states.001.1-of-2.safetensors"
    content = bytearray(path.read_bytes())
    if how == "a changed bit":
        content[-1] ^= 1
        path.write_bytes(content)
    assert of_ranks(tmp_path).find(BATCHES + (how == "of fewer batches")) is None
