"""PyTorch block by block is PyTorch step by step; what half precision and the last bit of embeddings cost it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from nbl_export.graph.precision import precision_of
from nbl_export.linearize.plan import Plan
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.weights import resident, streaming_of, streams
from nbl_export.verify.parity.figures import gates_for
from nbl_export.verify.parity.pytorch import (
    _by_blocks,
    pytorch_in_precision,
    record_pytorch,
    rounding_noise,
)
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


@pytest.mark.parametrize("name", families.DECODERS)
def test_every_decoder_with_the_cache_that_it_has(name: str) -> None:
    model = families.unsaved(name).eval()
    cached = all(block.kv or block.states for block in dummy_run(model).cache)
    rows = ragged_rows((12, 9), 250)
    same(_by_blocks(model, None, rows, 2, cached), record_pytorch(model, None, rows, 2, cached))


def by_hand(folder: Path, dtype: torch.dtype, plan: Plan) -> list[NDArray[np.float64]]:
    """Logits [sequence, vocab] of each row by transformers' own model in ``dtype``, with hooks for the maps."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    for index, layer in plan.layers.items():
        w, b = (torch.from_numpy(a).to(dtype) for a in (layer.w, layer.b))

        def overwrite(_m: Any, args: Any, kwargs: Any, output: Any, w: Any = w, b: Any = b) -> Any:
            u = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return (torch.nn.functional.linear(u, w, b), *output[1:])

        model.model.layers[index].self_attn.register_forward_hook(overwrite, with_kwargs=True)
    with torch.inference_mode():
        ids = [torch.from_numpy(row.astype(np.int64))[None] for row in ROWS]
        return [model(input_ids=i, use_cache=False).logits[0].double().numpy() for i in ids]


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_the_loss_is_that_of_transformers_in_half(
    stories_folder: Path, stories_model: Any, plan: Plan, name: str, dtype: torch.dtype, cached: bool
) -> None:
    own = pytorch_in_precision(precision_of(name), stories_model, plan, ROWS, STEPS, cached)
    assert own.prompt_lengths == (17, 10, 6) and [s.step for s in own.steps] == [0, 1, 2, 3]
    assert own.gates == gates_for(precision_of(name).gates)
    single, half = (by_hand(stories_folder, d, plan) for d in (torch.float32, dtype))
    lost = [np.abs(a - b) for a, b in zip(single, half, strict=True)]
    for step in own.steps:
        # The prompt's positions, or the one whose token is taught in this step.
        parts = [d[-STEPS - 1 + step.step :][:1] if step.step else d[: len(d) - STEPS] for d in lost]
        expected = np.concatenate(parts)
        assert step.tokens == len(expected)
        # Attention in another order rounds otherwise, in each number; on average it costs the same.
        assert step.mean_abs == pytest.approx(expected.mean(), rel=0.4)
    for model in (stories_model, *stories_model.model.layers):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {type(block.self_attn).__name__ for block in stories_model.model.layers} == {"LlamaAttention"}


def test_noise_is_of_the_embeddings_last_bit(stories_model: Any) -> None:
    """A last bit a thousand times larger moves the logits about a thousand times as much."""
    ids = torch.from_numpy(ROWS[0].astype(np.int64))[None]
    table = stories_model.get_input_embeddings().weight[ids]
    generator = torch.Generator().manual_seed(3)
    signs = torch.randint(0, 2, table.shape, generator=generator) * 2 - 1
    with torch.inference_mode():
        exact = stories_model(inputs_embeds=table, use_cache=False).logits
        moved = stories_model(inputs_embeds=table * (1 + signs * 2.0**-13), use_cache=False).logits
    expected = float((moved - exact).abs().max()) / 2**10
    # Rounding within the model adds its own, so only the order of magnitude is asked.
    assert expected / 10 < rounding_noise(stories_model, ROWS[:1]) < expected * 10
