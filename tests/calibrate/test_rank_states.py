"""What several processes keep of the states: from it any number goes on, and what is not whole or of others is left."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.calibrate.states import RankStates
from nbl_export.checkpoint import Checkpoint
from nbl_export.errors import InputError
from nbl_export.ranks import ALONE, Ranks
from tests.several import forked

OURS = {"model": "ours"}
BATCHES = 5


def states(folder: Path, ranks: Ranks = ALONE, identity: Any = OURS, every: float = 0.0) -> RankStates:
    return RankStates(Checkpoint(folder / "partial" / "states.safetensors", every), ranks, identity)


def arrays(part: int, batches: Any) -> dict[int, np.ndarray]:
    return {batch: np.full((2, 3), 100 * part + batch, np.float32) for batch in batches}


def saved(folder: Path, count: int, *parts: int, **how: Any) -> None:
    def work(ranks: Ranks) -> None:
        kept = states(folder, ranks, **how)
        for part in parts:
            kept.save(part, partial(arrays, part, ranks.mine(range(BATCHES))))

    assert forked(count, folder / "results", work) == [None] * count


def never() -> Any:
    pytest.fail("states of a save that is not")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "partial").glob("*"))


@pytest.mark.parametrize("count", [2, 3, 7])  # of seven, two have none
def test_any_number_of_processes_finds_the_latest(tmp_path: Path, count: int) -> None:
    saved(tmp_path, count, 1, 2)
    assert names(tmp_path) == [f"states.002.{rank}-of-{count}.safetensors" for rank in range(count)]

    def work(ranks: Ranks) -> Any:
        kept = states(tmp_path, ranks)
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
    found = states(tmp_path).find(BATCHES)
    assert found is not None and found[0] == 1


@pytest.mark.parametrize(
    "how", ["cut", "a changed bit", "of another model", "of fewer batches", "a link to nothing"]
)
def test_what_is_damaged_or_of_others_is_not_found(tmp_path: Path, how: str) -> None:
    saved(tmp_path, 2, 1, identity={"model": "theirs"} if how == "of another model" else OURS)
    path = tmp_path / "partial" / "states.001.1-of-2.safetensors"
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[:-1])
    elif how == "a changed bit":
        content[-1] ^= 1
        path.write_bytes(content)
    elif how == "a link to nothing":
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    assert states(tmp_path).find(BATCHES + (how == "of fewer batches")) is None


def test_a_file_that_goes_meanwhile_is_an_error_in_words(tmp_path: Path) -> None:
    saved(tmp_path, 2, 1)
    found = states(tmp_path).find(BATCHES)
    assert found is not None
    (tmp_path / "partial" / "states.001.1-of-2.safetensors").unlink()
    with pytest.raises(InputError):
        states(tmp_path).load(found[1], range(BATCHES))
