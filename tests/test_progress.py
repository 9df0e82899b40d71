"""Progress in MiB: never more than the total, never less at the end, whatever amounts it is told in."""

from __future__ import annotations

import numpy as np

from nbl_export.progress import Mebibytes, bytes_task, mebibytes
from tests.listening import Notes

MIB = 1 << 20


def test_amounts_add_up_however_they_are_cut() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        amounts = generator.integers(0, 3 * MIB, 15).tolist()
        task = Notes()
        done = Mebibytes(task, sum(amounts))
        for i, amount in enumerate(amounts):
            done(amount)
            assert sum(task.advanced) == min(sum(amounts[: i + 1]) // MIB, mebibytes(sum(amounts)))
        done.finish()
        assert sum(task.advanced) == mebibytes(sum(amounts))
        assert all(step > 0 for step in task.advanced), "a step of nothing is not told"


def test_a_task_of_bytes_is_whole_when_its_block_ends() -> None:
    listener = Notes()
    with bytes_task(listener, "Writing", 5 * MIB) as done:
        done(MIB)
        assert listener.advanced == [1]
    assert listener.tasks == [("Writing", 5, "MiB", 0)] and sum(listener.advanced) == 5
