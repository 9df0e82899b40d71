"""States between two blocks: in memory or in files, of any number of processes, and nothing taken that was changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.calibrate import collect as module
from nbl_export.calibrate.collect import States
from nbl_export.errors import InputError
from nbl_export.ranks import ALONE, Ranks
from tests.processes import forked

VALUES, BATCHES = 25, 5  # 100 bytes in float32
SMALL, LARGE = 100, 1 << 20
OURS = {"model": "ours"}


class Model(torch.nn.Module):
    """Computes in ``dtype``."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))


def of(number: int, part: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The states of a batch before a part."""
    return torch.randn(5, 5, generator=torch.Generator().manual_seed(100 * part + number)).to(dtype)


def made(
    folder: Path | None, ranks: Ranks = ALONE, memory: int = LARGE, identity: Any = OURS, **how: Any
) -> States:
    numbers = ranks.mine(range(BATCHES))
    return States(how.pop("model", Model()), numbers, VALUES, memory, folder, identity, ranks, **how)


def walked(states: States, parts: int) -> None:
    for part in range(1, parts + 1):
        for number in states.numbers:
            states.put(number, of(number, part))
        states.turn()
        states.save()


def assert_before(states: States, part: int) -> None:
    assert states.part == part
    for number in states.numbers:
        found = states.get(number)
        assert found is not None and torch.equal(found, of(number, part))


@pytest.mark.parametrize("memory", [SMALL, LARGE])
def test_states_after_a_part_are_those_before_the_next(tmp_path: Path, memory: int) -> None:
    for folder in (None, tmp_path):
        states = made(folder, memory=memory)
        assert states.on_disk == (memory == SMALL) and states.get(0) is None
        for part in range(1, 4):
            for number in states.numbers:
                states.put(number, of(number, part))
                if folder and part > 1:
                    assert torch.equal(states.get(number), of(number, part - 1))  # type: ignore[arg-type]
            states.turn()
            assert_before(states, part)
    assert len(list(tmp_path.iterdir())) == (BATCHES if memory == SMALL else 0), (
        "those of other parts are gone"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_bit_is_lost(tmp_path: Path, dtype: torch.dtype) -> None:
    states = made(tmp_path, memory=SMALL, model=Model(dtype))
    special = of(0, 0, dtype)
    special[0, :4] = torch.tensor([float("inf"), -0.0, 1e-40, 3.0]).to(dtype)
    states.put(0, special)
    states.turn()
    found = states.get(0)
    assert found is not None and found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), special.view(torch.uint8))


def test_they_are_in_memory_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Five batches of 100 bytes, before and after a part.
    for limit, on_disk in ((1000, False), (999, True), (100, True)):
        assert made(tmp_path, memory=limit).on_disk == on_disk
        monkeypatch.setattr(module, "half_free", lambda _model, limit=limit: limit)
        assert States(Model(), range(BATCHES), VALUES).on_disk == on_disk
    with pytest.raises(InputError) as caught:
        States(Model(), range(BATCHES), 25_001, 100_000)
    assert str(caught.value) == (
        "--memory 100,000 bytes is less than the states of one batch of rows take: give 101kB or more, or lower "
        "--seq-len."
    )


def test_files_that_nothing_goes_on_from_go_with_them() -> None:
    states = made(None, memory=SMALL)
    walked(states, 1)
    folder = states._place
    assert folder is not None and len(list(folder.iterdir())) == BATCHES
    del states
    assert not folder.exists()


# going on ----------------------------------------------------------------------------------------


def test_they_are_saved_when_it_is_time_or_asked_for(tmp_path: Path) -> None:
    states = made(tmp_path, every_seconds=3600.0)
    states.save(now=True)
    walked(states, 1)
    assert list(tmp_path.iterdir()) == []
    states.save(now=True)
    assert [path.name for path in tmp_path.iterdir()] == ["states.001.0-of-1.safetensors"]


def saved(folder: Path, count: int, parts: int, **how: Any) -> None:
    def work(ranks: Ranks) -> None:
        walked(made(folder / "partial", ranks, every_seconds=0.0, **how), parts)

    assert forked(count, folder / "results", work) == [None] * count


@pytest.mark.parametrize("count", [2, 7])  # of seven, two have none
def test_any_number_of_processes_goes_on_from_the_latest(tmp_path: Path, count: int) -> None:
    saved(tmp_path, 3, 1)
    saved(tmp_path, count, 2)
    names = sorted(path.name for path in (tmp_path / "partial").iterdir())
    assert names == [f"states.002.{rank}-of-{count}.safetensors" for rank in range(count)]

    def work(ranks: Ranks) -> Any:
        states = made(tmp_path / "partial", ranks)
        assert states.resume(BATCHES, most=3)
        assert_before(states, 2)

    for then in (1, 4):
        assert forked(then, tmp_path / "found", work) == [None] * then


def test_half_of_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    saved(tmp_path, 2, 1)
    before = {path: path.read_bytes() for path in (tmp_path / "partial").iterdir()}
    saved(tmp_path, 2, 2)
    (tmp_path / "partial" / "states.002.1-of-2.safetensors").unlink()
    for path, content in before.items():
        path.write_bytes(content)
    states = made(tmp_path / "partial")
    assert states.resume(BATCHES, most=2)
    assert_before(states, 1)
