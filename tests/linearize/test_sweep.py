"""Each version of a model has, row by row, the bits of a forward pass of the whole of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.linearize.adapters import Adapter, adapted
from nbl_export.linearize.plan import LinearLayer
from nbl_export.linearize.swap import ORIGINAL, Version, replaced, sweep
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.weights import Stored, streamed
from tests.listening import Notes
from tests.models.test_weights import logits, reads
from tests.tiny_types import tiny_model

D = 32
DOWN = "model.layers.2.mlp.down_proj.weight"
ROWS = [torch.arange(3 + i, 15 + 2 * i) for i in range(3)]


@pytest.fixture(scope="module")
def in_memory() -> Any:
    model = tiny_model("llama")
    dummy_run(model)  # the first walk makes it, by a pass of its own
    return model


@pytest.fixture(params=[False, True], ids=["in memory", "read block by block"])
def model(in_memory: Any, request: pytest.FixtureRequest) -> Any:
    return streamed(Stored(in_memory), torch.float32) if request.param else in_memory


def maps() -> dict[int, LinearLayer]:
    rng = np.random.default_rng(1)
    return {
        i: LinearLayer(rng.normal(size=(D, D)).astype(np.float32) / 4, rng.normal(size=D).astype(np.float32))
        for i in range(4)
    }


def change(size: float) -> dict[str, Adapter]:
    return {DOWN: Adapter(np.full((D, 1), size, np.float32), np.ones((1, 48), np.float32), ())}


def swept(model: Any, versions: list[Version], **options: Any) -> dict[tuple[int, int], torch.Tensor]:
    found = {
        (row, which): out.clone() for row, which, out in sweep(model, ROWS, versions, "normed", **options)
    }
    assert len(found) == len(ROWS) * len(versions)
    return found


def test_versions_are_whole_runs_and_weights_are_read_once(in_memory: Any) -> None:
    model, linear = streamed(Stored(in_memory), torch.float32), maps()
    settled = {1: linear[1]}
    wanted = [
        (Version(0), {}, {}),
        (Version(1, settled), settled, {}),
        (Version(2, {1: linear[1], 3: linear[3]}, change(0.05)), {1: linear[1], 3: linear[3]}, change(0.05)),
        (Version(2, settled, change(0.1)), settled, change(0.1)),
        (Version(0, {0: linear[0]}), {0: linear[0]}, {}),
    ]
    lengths: list[int] = []
    notes = Notes()
    with reads() as found:
        ours = swept(
            model,
            [version for version, *_ in wanted],
            settled=settled,
            advance=lengths.append,
            listener=notes,
        )
    blocks = in_memory.config.num_hidden_layers
    assert notes.tasks == [("Running the blocks", blocks, "blocks", 0)] and notes.advanced == [1] * blocks
    assert set(Counter(found).values()) == {1} and lengths == [len(row) for row in ROWS]
    for which, (_, layers, adapters) in enumerate(wanted):
        with replaced(in_memory, layers, "normed") if layers else nullcontext(), adapted(in_memory, adapters):
            for number, row in enumerate(ROWS):
                assert torch.equal(ours[number, which], logits(in_memory, row[None])[0]), (which, number)
    assert len({float(out.sum()) for (row, _), out in ours.items() if row == 0}) == len(wanted)


def test_a_change_begins_with_its_version_and_ends_with_the_sweep(model: Any) -> None:
    before, seen = logits(model, ROWS[0][None])[0], []

    @contextmanager
    def changed() -> Iterator[None]:
        seen.append("begun")
        with adapted(model, change(0.2)):
            yield
        seen.append("ended")

    ours = swept(model, [Version(2, change=changed())])
    assert seen == ["begun", "ended"] and not torch.equal(ours[0, 0], before)
    assert torch.equal(swept(model, [ORIGINAL])[0, 0], before)


def test_a_sweep_that_nobody_finishes_leaves_the_model_as_it_was(model: Any) -> None:
    before = logits(model, ROWS[0][None])
    for _ in sweep(model, ROWS, [Version(1, maps())], "normed"):
        break
    assert torch.equal(logits(model, ROWS[0][None]), before)
