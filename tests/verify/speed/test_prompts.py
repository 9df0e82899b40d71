"""The timed prompt: its cache is really filled, a static one really in place, and a step costs the same again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.linearize.plan import Plan
from nbl_export.runtime.ort import OrtModel
from nbl_export.verify.speed.candidates import OrtPrompt, timed_row
from tests.fixtures_graph import maps_in_place, plan_by_hand
from tests.runtime.fake_tensorrt import Graphs, graphs_of

CONTEXT, ROOM = 11, 3
ALL = (0, 1, 2, 3, 4)
IN_PLACE = ("static", "shared")
FORMS = (*IN_PLACE, "concat")


@pytest.fixture(scope="module")
def graphs(stories_model: Any, stories_out: Path) -> Graphs:
    return graphs_of(stories_model, stories_out)


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


def test_a_timed_row_has_tokens_of_every_vocabulary() -> None:
    assert timed_row(40).tolist() == [*range(32), *range(8)] and timed_row(3).dtype == np.int32


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


def test_a_growing_cache_is_handed_back_and_not_written(graphs: Graphs) -> None:
    prompt = prompt_of(graphs("concat"))
    prompt.prefill()
    before, places = contents(prompt), {name: value.data_ptr() for name, value in prompt.past.items()}
    assert {value.shape for value in before.values()} == {(1, 4, CONTEXT, 8)}
    for _ in range(2):
        prompt.step()
        outputs = dict(zip(prompt.model.output_names, prompt._step.get_outputs(), strict=True))
        for name, value in contents(prompt).items():
            assert np.array_equal(value, before[name]) and prompt.past[name].data_ptr() == places[name]
            grown = outputs[name.replace("past_key_values", "present")]
            assert grown.shape() == [1, 4, CONTEXT + 1, 8] and grown.data_ptr() not in places.values()
            assert np.array_equal(grown.numpy()[:, :, :CONTEXT], value)


@pytest.mark.parametrize(
    ("form", "places"), [("static", CONTEXT + ROOM), ("shared", CONTEXT + ROOM), ("concat", CONTEXT)]
)
@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2)])
def test_bytes_are_those_of_the_filled_cache(
    graphs: Graphs, form: str, places: int, precision: str, size: int
) -> None:
    for layers in ((), (0, 3), ALL):
        prompt = prompt_of(graphs(form, precision, layers))
        assert prompt.memory_bytes() == 0
        prompt.prefill()
        assert prompt.memory_bytes() == 2 * (5 - len(layers)) * 4 * places * 8 * size
        prompt.step()
        assert prompt.memory_bytes() == 2 * (5 - len(layers)) * 4 * places * 8 * size


@pytest.mark.parametrize("context", [1, 64])
def test_any_length(graphs: Graphs, context: int) -> None:
    wanted, _ = expected(graphs.model, plan_by_hand(graphs.out, ()), [*timed_row(context), 1])
    for form in FORMS:
        prompt = prompt_of(graphs(form), context, 1)
        prompt.prefill()
        prompt.step()
        np.testing.assert_allclose(logits(prompt._step)[0], wanted[-1:], rtol=0, atol=2e-4)
