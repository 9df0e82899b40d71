"""Candidates on the CPU: what a cell of each really runs, its cache really filled, and what one round of it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.engine.network import Limits
from nbl_export.linearize.plan import Plan
from nbl_export.runtime.ort import OrtModel
from nbl_export.runtime.tensorrt import EngineStream
from nbl_export.verify.speed.candidates import (
    TIMED_STEPS,
    EnginePrompt,
    OrtPrompt,
    TorchPrompt,
    timed_row,
)
from nbl_export.verify.speed.race import DECODE_STEPS, Rounds, decode_seconds, prefill_seconds, race
from tests.fixtures_graph import maps_in_place, plan_by_hand
from tests.runtime.fake_tensorrt import FakeEngine, Graphs, loaded_engine
from tests.verify.clocked import Scripted

LIMITS = Limits(max_batch=2, max_seq=12, max_context=12 + TIMED_STEPS)


def cached(model: Any, tokens: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Keys and values [heads, tokens, head_dim] of each layer, by transformers."""
    with torch.inference_mode():
        cache = model(torch.tensor([list(tokens)]), use_cache=True).past_key_values
    return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in cache.layers]


@pytest.mark.parametrize("form", ["static", "concat"])
def test_an_engine_really_fills_its_cache_and_advances(graphs: Graphs, form: str) -> None:
    stream = EngineStream(loaded_engine(graphs(form), LIMITS))
    prompt = EnginePrompt(stream, 12)
    for steps in (TIMED_STEPS, 3):  # to the end of the context, and anew from an empty cache
        prompt.prefill()
        for _ in range(steps):
            prompt.step()
        pairs, real = stream.cache()
        assert real.sum() == 12 + steps
        for pair, expected in zip(pairs, cached(graphs.model, [*range(12), *[1] * steps]), strict=True):
            for side, wanted in zip(pair, expected, strict=True):
                np.testing.assert_allclose(side[0][:, real[0]], wanted, rtol=0, atol=1e-4)
    assert prompt.memory_bytes() == stream.cache_bytes + 2 * FakeEngine.device_memory_size_v2


def test_no_timed_step_records_a_graph(graphs: Graphs) -> None:
    """Recording takes far longer than a step: it belongs to the warm-up, or the 99th percentile is its time."""
    loaded = loaded_engine(graphs("static"), LIMITS)
    prompt = EnginePrompt(EngineStream(loaded), 12)
    race({"base engine": prompt}, decode_seconds, Rounds(3, 3), lambda _: None)
    events = loaded.device.events  # type: ignore[attr-defined]
    assert events.count("replay") > 0
    second = [i for i, event in enumerate(events) if event == ("run", "prefill")][1]
    assert ("capture", "decode") in events[:second]
    assert ("capture", "decode") not in events[second:]


def test_a_round_of_decode_is_some_steps_after_the_prompt(clock: list[float]) -> None:
    log: list[str] = []
    prompt: Any = Scripted("it", clock, log, lambda n: float(n))
    assert decode_seconds(prompt) == pytest.approx(tuple(range(1, 1 + DECODE_STEPS)))
    assert log == ["it rewind", *["it step"] * (1 + DECODE_STEPS)]
    log.clear()
    assert len(prefill_seconds(prompt)) == 1 and log == ["it prefill"]


def test_pytorch_begins_anew_and_advances(stories_model: Any) -> None:
    stories_model.set_attn_implementation("sdpa")
    prompt = TorchPrompt(stories_model, 12)
    for steps in (5, 2):
        prompt.prefill()
        for _ in range(steps):
            prompt.step()
        expected = cached(stories_model, [*range(12), *[0] * steps])
        for layer, (keys, values) in zip(prompt._cache.layers, expected, strict=True):
            np.testing.assert_allclose(layer.keys[0].numpy(), keys, rtol=0, atol=1e-4)
            np.testing.assert_allclose(layer.values[0].numpy(), values, rtol=0, atol=1e-4)
        assert prompt.memory_bytes() == 2 * 5 * 4 * (12 + steps) * 8 * 4


CONTEXT, ROOM = 11, 3


ALL = (0, 1, 2, 3, 4)


IN_PLACE = ("static", "shared")


FORMS = (*IN_PLACE, "concat")


def prompt_of(path: Path, context: int = CONTEXT, room: int = ROOM) -> OrtPrompt:
    return OrtPrompt(OrtModel(path, rounded=False), context, room)


def expected(model: Any, plan: Plan, tokens: Sequence[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits [tokens, vocab] and the cache of the layers that keep attention, by transformers."""
    with maps_in_place(model, plan), torch.inference_mode():
        output = model(torch.tensor([list(tokens)]), use_cache=True)
    kept = [layer for i, layer in enumerate(output.past_key_values.layers) if i not in plan.layers]
    cache = {
        f"past_key_values.{n}.{side}": getattr(layer, f"{side}s").numpy()
        for n, layer in enumerate(kept)
        for side in ("key", "value")
    }
    return output.logits[0].numpy(), cache


def logits(binding: Any) -> np.ndarray:
    return binding.get_outputs()[0].numpy().copy()


def contents(prompt: OrtPrompt) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in prompt.past.items()}


@pytest.mark.parametrize("layers", [(), (0, 3), ALL], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_prefill_and_step_compute_what_pytorch_does(
    graphs: Graphs, form: str, layers: tuple[int, ...]
) -> None:
    """Again and again: steps write behind the prompt, and the next prefill must not mind."""
    prompt, plan = prompt_of(graphs(form, "fp32", layers)), plan_by_hand(graphs.out, layers)
    wanted, cache = expected(graphs.model, plan, [*timed_row(CONTEXT), 1])
    for _ in range(3):
        prompt.prefill()
        made = logits(prompt._prefill)[0]
        assert len(made) == (CONTEXT if form == "static" else 1)  # no logits that nobody reads
        np.testing.assert_allclose(made, wanted[:-1][-len(made) :], rtol=0, atol=2e-4)
        for _ in range(ROOM + 2):  # the step does not advance, so there is always room
            prompt.step()
            np.testing.assert_allclose(logits(prompt._step)[0], wanted[-1:], rtol=0, atol=2e-4)
        found = contents(prompt)
        assert found.keys() == cache.keys()
        for name, value in cache.items():
            filled = found[name][:, :, :CONTEXT]
            np.testing.assert_allclose(filled, value[:, :, :CONTEXT], rtol=0, atol=2e-4)


@pytest.mark.parametrize("form", IN_PLACE)
def test_one_buffer_is_written_where_it_lies(graphs: Graphs, form: str) -> None:
    prompt = prompt_of(graphs(form))
    prompt.prefill()
    places = {name: value.data_ptr() for name, value in prompt.past.items()}
    before = contents(prompt)
    assert len(places) == len(set(places.values())) == 10 and 0 not in places.values()
    for value in before.values():
        assert value.shape == (1, 4, CONTEXT + ROOM, 8) and not value[:, :, CONTEXT:].any()
    prompt.step()
    after = contents(prompt)
    _, cache = expected(graphs.model, plan_by_hand(graphs.out, ()), [*timed_row(CONTEXT), 1])
    for name, value in after.items():
        # The token's own place has changed, and no other.
        np.testing.assert_allclose(value[:, :, CONTEXT], cache[name][:, :, CONTEXT], rtol=0, atol=2e-4)
        assert np.array_equal(np.delete(value, CONTEXT, axis=2), np.delete(before[name], CONTEXT, axis=2))
    outputs = dict(zip(prompt.model.output_names, prompt._step.get_outputs(), strict=True))
    prompt.step()
    prompt.prefill()
    for name, value in prompt.past.items():
        assert value.data_ptr() == places[name]
        assert outputs[name.replace("past_key_values", "present")].data_ptr() == places[name]
    for name, value in contents(prompt).items():
        assert np.array_equal(value, after[name])
