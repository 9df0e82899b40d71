"""What PyTorch gives block by block, with all steps in each, is what it gives step by step, and is read once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.linearize.plan import Plan
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.weights import resident, streaming_of, streams
from nbl_export.verify.parity.noise import rounding_noise
from nbl_export.verify.parity.reference import _by_blocks, record_pytorch
from tests import families
from tests.fixtures_graph import plan_by_hand, ragged_rows
from tests.listening import Notes
from tests.models.test_weights import reads, stored_in

LAYERS = (1, 3)
ROWS = ragged_rows((20, 13, 9), 500)
STEPS = 3


def same(a: Any, b: Any) -> None:
    assert (a.kv_layers, a.lengths) == (b.kv_layers, b.lengths)
    for one, other in zip(a.steps, b.steps, strict=True):
        assert one.logits.shape == other.logits.shape and np.array_equal(one.logits, other.logits)
        for (cache, real), (other_cache, other_real) in zip(one.caches, other.caches, strict=True):
            assert np.array_equal(real, other_real)
            for pair, others in zip(cache, other_cache, strict=True):
                assert all(np.array_equal(x, y) for x, y in zip(pair, others, strict=True))


@pytest.fixture
def plan(stories_out: Path) -> Plan:
    return plan_by_hand(stories_out, LAYERS)


@pytest.fixture
def streaming(stories_folder: Path, tmp_path: Path) -> Any:
    """A model that is read when it is needed: its weights are stored in half precision."""
    folder = shutil.copytree(stories_folder, tmp_path / "model")
    model = load_model(find_model(str(stored_in(folder, torch.bfloat16))))
    dummy_run(model)  # which reads it too, at the first call
    return model


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_rows_by_themselves_by_blocks_as_step_by_step(streaming: Any, plan: Plan, cached: bool) -> None:
    alone = ragged_rows((90, 30), 500, seed=1)
    blocks, whole = Notes(), Notes()
    by_blocks = record_pytorch(streaming, plan, ROWS, STEPS, cached, alone, listener=blocks)
    with resident(streaming):
        same(record_pytorch(streaming, plan, ROWS, STEPS, cached, alone, listener=whole), by_blocks)
    steps = ("Running PyTorch", 3 * (STEPS + 1), "steps", 0)
    assert blocks.tasks == [steps, *[("Running the blocks", 5, "blocks", 0)] * 3]
    assert blocks.advanced == [*[1] * 5, STEPS + 1] * 3
    assert whole.tasks == [steps] and whole.advanced == [1] * 3 * (STEPS + 1)
    # The last 64 logits of a prefill, and the caches once all is decoded.
    assert [len(s.logits) for s in by_blocks.steps] == [sum(map(len, ROWS)) - 3 * STEPS + 64 + 27, 5, 5, 5]
    assert [len(s.caches) for s in by_blocks.steps] == [1, 1, 1, 3]


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("planned", [True, False], ids=["linearized", "original"])
def test_by_blocks_as_step_by_step(streaming: Any, plan: Plan, cached: bool, planned: bool) -> None:
    assert streams(streaming)
    with reads() as found:
        by_blocks = record_pytorch(streaming, plan if planned else None, ROWS, STEPS, cached)
    assert sorted(found) == sorted(w.name for w in _read_once(streaming))
    with resident(streaming):
        same(record_pytorch(streaming, plan if planned else None, ROWS, STEPS, cached), by_blocks)
    assert by_blocks.kv_layers == (((0, 2, 4) if planned else (0, 1, 2, 3, 4)) if cached else None)


def _read_once(model: Any) -> list[Any]:
    streaming = streaming_of(model)
    assert streaming is not None
    return [weight for unit in streaming.units.values() for weight in unit]


@pytest.mark.parametrize("planned", [True, False], ids=["linearized", "original"])
def test_noise_by_blocks_is_the_same_and_reads_once(streaming: Any, plan: Plan, planned: bool) -> None:
    blocks, whole = Notes(), Notes()
    with reads() as found:
        noise = rounding_noise(streaming, ROWS, plan if planned else None, listener=blocks)
    assert sorted(found) == sorted(w.name for w in _read_once(streaming))
    with resident(streaming):
        assert rounding_noise(streaming, ROWS, plan if planned else None, listener=whole) == noise > 0
    passes = ("Measuring rounding", 2, "passes", 0)
    assert blocks.tasks == [passes, ("Running the blocks", 5, "blocks", 0)]
    assert (blocks.advanced, whole.tasks, whole.advanced) == ([*[1] * 5, 1, 1], [passes], [1, 1])


@pytest.mark.parametrize("name", families.DECODERS)
def test_every_decoder_with_the_cache_that_it_has(name: str) -> None:
    model = families.unsaved(name).eval()
    cached = all(block.kv or block.states for block in dummy_run(model).cache)
    rows = ragged_rows((12, 9), 250)
    same(_by_blocks(model, None, rows, 2, cached), record_pytorch(model, None, rows, 2, cached))
