"""A run that begins at a later block ends in the same bits as a whole one, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import attention_layers, block_stack, hidden_size
from nbl_export.models.partial_forward import (
    beginning,
    one_of_each_kind,
    recomputed,
    recording_inputs,
    starting_at,
)
from tests.families import unsaved
from tests.tiny_types import tiny_model

# Windows and rope tables that differ by layer, parallel and sequential blocks, alibi, learned positions, factors
# on the stream, projections around the blocks, experts, convolutions between the attention.
FAMILIES = (
    "llama",
    "qwen2",
    "gemma2",
    "gemma3-text",
    "gpt2",
    "gpt_neox",
    "falcon",
    "falcon-alibi",
    "bloom",
    "opt-post-norm",
    "granite",
    "gpt_oss",
    "phi",
)
HYBRIDS = ("lfm2", "gpt_neo", "mixtral", "deepseek_v2")
_MADE: dict[str, Any] = {}


def made(name: str) -> Any:
    if name not in _MADE:
        model = tiny_model(name) if name in HYBRIDS else unsaved(name)
        _MADE[name] = model.eval().requires_grad_(False)
        dummy_run(_MADE[name])  # whose own run is not to be counted
    return _MADE[name]


@pytest.fixture(params=[*FAMILIES, *HYBRIDS])
def model(request: pytest.FixtureRequest) -> Any:
    return made(request.param)


IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))


def run(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@contextmanager
def calls(model: Any) -> Iterator[list[int]]:
    """Within the block, the numbers of the blocks that were run, in order."""
    found: list[int] = []
    stack = attention_layers(model)[0].block.rpartition(".")[0]
    hooks = [
        block.register_forward_hook(lambda *_, i=i: found.append(i))
        for i, block in enumerate(model.get_submodule(stack))
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def modules(model: Any) -> dict[str, tuple[int, int, int]]:
    """Every module by its name, as an object, with the number of its hooks."""
    return {
        name: (id(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()
    }


def test_a_run_from_any_layer_on_gives_the_same_bits(model: Any) -> None:
    layers = attention_layers(model)
    whole, before = run(model), None
    with recording_inputs(model, [layer.index for layer in layers]) as kept:
        assert torch.equal(run(model), whole)
    assert sorted(kept) == [layer.index for layer in layers]
    for index, states in kept.items():
        with calls(model) as ran, starting_at(model, index, states):
            assert torch.equal(run(model), whole), index
        assert min(ran) == index, "the blocks before it are not run"
        # The states are what counts, not the tokens before them.
        with starting_at(model, index, states * 0.5):
            other = run(model)
        assert not torch.allclose(other, whole)
        assert before is None or not torch.allclose(other, before)
        before = other


def test_the_model_is_as_it_was(model: Any) -> None:
    layers = attention_layers(model)
    dummy_run(model)
    before = modules(model)
    with recording_inputs(model, [layer.index for layer in layers]) as kept:
        whole = run(model)
    last = layers[-1].index
    with starting_at(model, last, kept[last]):
        assert modules(model) != before
    assert modules(model) == before
    with pytest.raises(RuntimeError, match="stop"), starting_at(model, last, kept[last]):
        raise RuntimeError("stop")
    with (
        pytest.raises(RuntimeError, match="stop"),
        recording_inputs(model, [layer.index for layer in layers]),
    ):
        raise RuntimeError("stop")
    assert modules(model) == before
    assert torch.equal(run(model), whole)


def test_a_run_that_fails_inside_the_model_leaves_it_as_it_was() -> None:
    model = made("llama")
    dummy_run(model)
    before = modules(model)
    with pytest.raises(RuntimeError), starting_at(model, 2, torch.zeros(1, 5, 7)):
        run(model)  # the states have another width
    assert modules(model) == before


def test_states_are_those_of_transformers_own_outputs() -> None:
    for name in ("llama", "gemma3-text", "gpt2", "falcon"):
        model = made(name)
        with (
            torch.inference_mode(),
            recording_inputs(model, [layer.index for layer in attention_layers(model)]) as kept,
        ):
            states = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
        for index in kept:
            assert torch.equal(kept[index], states[index]), (name, index)


def test_many_blocks_that_return_tuples_are_passed_over() -> None:
    """A block in their place that returned a bare tensor would be taken apart, a dimension each time."""
    model = unsaved("bloom", n_layer=6, num_hidden_layers=6).eval().requires_grad_(False)
    with recording_inputs(model, [layer.index for layer in attention_layers(model)]) as kept:
        whole = run(model)
    with starting_at(model, 5, kept[5]):
        assert torch.equal(run(model), whole)


def test_what_a_trial_says_of_blocks() -> None:
    returns = {name: dummy_run(made(name)).block_returns for name in ("llama", "falcon", "bloom", "lfm2")}
    assert all(sorted(found) == [0, 1, 2, 3] for found in returns.values())
    # Both kinds are among the models of these tests.
    assert set(returns["llama"].values()) == {None}
    assert set(returns["bloom"].values()) == {2}


# backward -----------------------------------------------------------------------------------------


def gradient(model: Any, block: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the logits' squares after a shift of what ``block`` gives, and its gradient by the shift."""
    shift = torch.zeros(hidden_size(model), requires_grad=True)

    def add(_block: Any, _args: Any, output: Any) -> Any:
        return (output[0] + shift, *output[1:]) if isinstance(output, tuple) else output + shift

    hook = block.register_forward_hook(add)
    total = model(input_ids=IDS, use_cache=False).logits.square().sum()
    total.backward()
    hook.remove()
    assert shift.grad is not None
    return total.detach(), shift.grad


def test_blocks_computed_again_give_the_same_gradient(model: Any) -> None:
    stack = block_stack(model)[1]
    before = list(stack.children())
    calls = [0] * len(before)
    total, expected = gradient(model, before[1])
    hooks = [
        block.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
        for i, block in enumerate(before)
    ]
    try:
        with recomputed(model, 1):
            found = gradient(model, before[1])
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(found[0], total) and torch.equal(found[1], expected) and expected.any()
    assert calls == [1, 1, *[2] * (len(before) - 2)], "nothing before the shift is asked for"
    assert list(stack.children()) == before


def test_blocks_that_share_more_than_states_are_not_computed_again() -> None:
    model = unsaved("llama").eval().requires_grad_(False)
    shared: dict[str, Any] = {}
    blocks = list(block_stack(model)[1].children())
    for block in blocks:
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: (args, {**kwargs, "shared": shared}), with_kwargs=True
        )
    with recomputed(model, 0):
        assert list(block_stack(model)[1].children()) == blocks


KINDS = {
    "llama": [0],
    "gpt_oss": [0, 1],  # a window, and none
    "gpt_neo": [0, 1],
    "lfm2": [0, 1],  # a convolution, and attention
    "deepseek_v2": [0, 2],  # an MLP, and experts
    "smollm3": [0, 3],  # with and without rotary embedding
}


@pytest.mark.parametrize("name", KINDS)
def test_one_block_of_each_kind_is_left(name: str) -> None:
    model = made(name) if name != "smollm3" else unsaved(name).eval()
    dummy_run(model)
    stack: Any = block_stack(model)[1]
    before, whole = list(stack), run(model)
    with one_of_each_kind(model) as count:
        assert [i for i, block in enumerate(stack) if block is before[i]] == KINDS[name]
        assert count == len(KINDS[name])
        assert not torch.equal(run(model), whole)
    assert list(stack) == before and torch.equal(run(model), whole)


def test_blocks_that_differ_in_a_size_or_a_setting_are_of_two_kinds() -> None:
    model = tiny_model("llama")
    dummy_run(model)
    stack: Any = block_stack(model)[1]
    stack[2].mlp.down_proj = torch.nn.Linear(48, 40)
    stack[3].self_attn.scaling = 0.5
    with one_of_each_kind(model) as count:
        assert count == 3


def test_all_blocks_that_share_more_than_states_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    facts = replace(dummy_run(model), separate=False)
    monkeypatch.setattr("nbl_export.models.partial_forward.dummy_run", lambda _: facts)
    with one_of_each_kind(model) as count:
        assert count == 4


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_a_run_begins_where_its_keys_and_values_are_made(model_type: str) -> None:
    model = tiny_model(model_type)  # layer 2 reads those of layer 0, layer 3 those of 1
    assert [beginning(model, index) for index in range(4)] == [0, 0, 0, 0]
    one = tiny_model(
        model_type,
        layer_types=["full_attention", "sliding_attention", *["full_attention"] * 2],
        num_kv_shared_layers=1,
    )
    assert [beginning(one, index) for index in range(4)] == [0, 1, 2, 2]
    expected = run(one)
    with recording_inputs(one, [layer.index for layer in attention_layers(one)]) as states:
        run(one)
    for index in range(3):
        with starting_at(one, index, states[index]):
            assert torch.equal(run(one), expected)
