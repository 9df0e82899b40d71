"""What can become linear: attentions that nobody reads from, MLPs that are found, spans that only add to the stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbl_export.blocks import ATTENTION, MLP, PARTS, Mlp, Span, spans_of
from nbl_export.errors import InputError
from nbl_export.linearize.plan import DROPPED, by_part
from nbl_export.linearize.swap import replaced
from nbl_export.models.candidates import (
    adding,
    block_modules,
    blocks_of,
    candidates,
    check_blocks,
    choices,
    described,
    observing,
)
from nbl_export.models.layers import attention_layers, mlp_modules
from nbl_export.models.running import observed
from nbl_export.models.walk import segments, walking
from tests.families import LAYERS, WIDTH, unsaved
from tests.tiny_types import tiny_model


def test_layers_that_others_read_are_no_candidates() -> None:
    model = tiny_model("gemma3n_text")
    assert [layer.index for layer in candidates(model)] == [2, 3]
    assert described(model) == {
        "blocks": 4,
        "kinds": {"2": "sliding window", "3": "full"},
        "others": {
            "0": "sliding window: its keys and values are read by layer 2",
            "1": "full: its keys and values are read by layer 3",
        },
    }


def test_mlps_of_which_none_can_become_linear_are_refused_with_the_reason() -> None:
    model = tiny_model("llama")
    for layer in model.model.layers:  # which runs it once more
        layer.register_forward_hook(lambda block, _args, output: block.mlp(output))
    with pytest.raises(InputError, match=r"none of Llama\w* can become linear \(it is run more than once"):
        check_blocks(model, PARTS)
    check_blocks(model, (ATTENTION,))
    check_blocks(tiny_model("llama"), PARTS)


# MLPs ---------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 5, 8, 13, 21, 34, 55, 89]])
# Every family whose MLP is one block between two tensors; the module that writes y, and the one that reads h.
FOUND = {
    "llama": ("mlp", "post_attention_layernorm"),
    "gemma2": ("mlp", "pre_feedforward_layernorm"),
    "olmo2": ("mlp", "mlp"),
    "phi": ("mlp", "input_layernorm"),
    "mixtral": ("mlp", "post_attention_layernorm"),
    "gpt2": ("mlp", "ln_2"),
    "bloom": ("mlp.dense_4h_to_h", "post_attention_layernorm"),
    "gpt_oss": ("mlp", "post_attention_layernorm"),
    "opt": ("fc2", "final_layer_norm"),
    "opt-post-norm": ("fc2", "fc1"),
    "gemma3n": ("mlp", "pre_feedforward_layernorm"),
    "gemma4": ("mlp", "pre_feedforward_layernorm"),
}
# Their MLP is modules of the layer, not one, so that there is none to be run alone.
APART = ("opt", "opt-post-norm")
# A norm behind the MLP, or the attention beside it, or more than both.
NOT_ADDED = ("gemma2", "olmo2", "phi", "opt-post-norm", "gemma3n", "gemma4")


def kept(seen: dict[Any, tuple[torch.Tensor, ...]]) -> Any:
    """Keeps what passes; a model may add to it in place."""
    return lambda index, *rest: seen.update({index: tuple(t.clone() for t in rest)})


def unsaved_of(family: str) -> Any:
    return unsaved(family).eval().requires_grad_(False)


@pytest.mark.parametrize("family", FOUND)
def test_what_is_seen_is_what_the_mlp_reads_and_adds(family: str) -> None:
    """The stream after the MLP is the one before it and y, in families that add y as it is."""
    model = unsaved_of(family)
    found = candidates(model, {MLP})
    assert [one.index for one in found] == [Mlp(i) for i in range(LAYERS)]
    output, stream = FOUND[family]
    assert {one.output.removeprefix(f"{one.block}.") for one in found} == {output}
    assert {one.stream.removeprefix(f"{one.block}.") for one in found} == {stream}
    seen: dict[Any, tuple[torch.Tensor, ...]] = {}
    states: list[torch.Tensor] = []
    hook = model.get_submodule(blocks_of(model)[0].block).register_forward_hook(
        lambda _m, _a, output: states.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode(), observed(model, blocks_of(model), kept(seen)):
        model(input_ids=IDS)
    hook.remove()
    h, x, y = seen[Mlp(0)]
    with torch.inference_mode():
        module = model.get_submodule(block_modules(model, Mlp(0)).module)
        if family in APART:
            layer = model.model.decoder.layers[0]
            given = layer.fc2(layer.activation_fn(module(x)))
            assert torch.allclose(given, y, atol=1e-6)
        else:
            given = module(x, *([torch.zeros_like(x)] if family == "bloom" else []))
            assert torch.equal(given[0] if isinstance(given, tuple) else given, y)
    assert h.shape == x.shape == y.shape == (*IDS.shape, WIDTH)
    if family not in NOT_ADDED:
        assert torch.allclose(states[0], h + y, atol=1e-6)


def test_an_attention_whose_family_is_called_after_its_experts_is_no_mlp() -> None:
    model = tiny_model("olmoe")
    assert not any(isinstance(found, str) for found in mlp_modules(model).values())
    check_blocks(model, PARTS)


# spans --------------------------------------------------------------------------------------------

# Family → a part of the reason.
NOT = {
    "gemma2": "such as a norm between",
    "olmo2": "such as a norm between",
    "bloom": "adds the residual itself",
    "opt-post-norm": "such as a norm between",
    "gemma3n": "more than the stream from each other",
}


@pytest.mark.parametrize("name", ["llama", "mixtral", "phi", "gpt2", "gpt_neox", "opt", "granite"])
def test_layers_that_only_add(name: str) -> None:
    model = unsaved_of(name)
    found, scale = adding(model), getattr(model.config, "residual_multiplier", 1.0)
    assert (scale != 1.0) == (name == "granite")
    assert found.scales == pytest.approx(dict.fromkeys(range(LAYERS), scale))
    assert found.why_not == {} and choices(model, ["span"]) == spans_of(range(LAYERS))


@pytest.mark.parametrize("name", NOT)
def test_layers_that_do_more(name: str) -> None:
    model = unsaved_of(name)
    found = adding(model)
    assert found.scales == {} and choices(model, ["span"]) == []
    assert all(NOT[name] in why for why in found.why_not.values())
    if name in ("gemma2", "bloom"):
        with pytest.raises(InputError, match=rf"no layer of \w+ can be in one .*{NOT[name]}.*--blocks both"):
            check_blocks(model, ["attention", "mlp", "span"])


def test_a_norm_that_changes_next_to_nothing_is_seen() -> None:
    """A norm of weight 1 gives a y of the same direction, and another size for each token."""
    model = unsaved_of("gemma2")
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data.zero_()  # Gemma's norms multiply by 1 + weight
        layer.post_feedforward_layernorm.weight.data.zero_()
    assert adding(model).scales == {}


@pytest.fixture(scope="module")
def granite() -> Any:
    return unsaved_of("granite")


def test_what_a_span_adds_is_what_its_map_is_to_write(granite: Any) -> None:
    """With exactly that in the place of its first attention, and the rest dropped, nothing changes after the span."""
    ids = torch.arange(3, 27).reshape(2, 12)
    span, seen = Span(1, 2), {}

    def observe(block: Any, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        seen[block] = (h.clone(), x.clone(), y.clone())

    assert span in choices(granite, ["span"])  # before the hooks of a walk
    states: Any = None
    with torch.inference_mode(), walking(granite) as run:
        for part in segments(granite)[:2]:
            wanted = [1, Mlp(1), span, Span(1, 1)] if part.start == 1 else []
            with observing(granite, run, part, wanted, observe) as step:
                states = step({"input_ids": ids}, states)
    assert set(seen) == {1, Mlp(1), span, Span(1, 1)}
    with torch.inference_mode():
        every = granite(input_ids=ids, output_hidden_states=True).hidden_states
    # The states are those after the part, not after the span.
    torch.testing.assert_close(states, every[2])
    torch.testing.assert_close(seen[span][0], every[1])
    assert torch.equal(seen[span][1], seen[1][1])
    y = seen[span][2].float()
    with torch.inference_mode(), replaced(granite, by_part({span: DROPPED}), "normed"):
        module = granite.get_submodule(attention_layers(granite)[1].module)
        hook = module.register_forward_hook(lambda _m, _a, output: (y, *output[1:]))
        found = granite(input_ids=ids, output_hidden_states=True).hidden_states
        hook.remove()
    torch.testing.assert_close(found[3], every[3], rtol=1e-4, atol=1e-4)
    assert (seen[Span(1, 1)][2] - seen[span][2]).norm() > 0.1 * y.norm()
