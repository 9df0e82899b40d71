"""Which layers can be in a span: those that only add to the stream, as a pass with numbers of our own shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbl_export.blocks import Mlp, Span
from nbl_export.errors import InputError
from nbl_export.linearize.plan import DROPPED, LinearLayer, by_part
from nbl_export.linearize.swap import replaced
from nbl_export.models.layers import attention_layers
from nbl_export.models.load import load_model
from nbl_export.models.source import find_model
from nbl_export.models.spans import adding, check_blocks, choices, observing
from nbl_export.models.walk import segments, walking
from tests import families

D = families.WIDTH
ADDING = (
    "llama",
    "mixtral",
    "phi",
    "gpt2",
    "gpt_neox",
    "phi3",
    "mistral",
    "qwen3",
    "falcon-new",
    "stablelm",
    "opt",
)
# Family → a part of the reason.
NOT = {
    "gemma2": "such as a norm between",
    "olmo2": "such as a norm between",
    "bloom": "adds the residual itself",
    "opt-post-norm": "such as a norm between",
    "gemma3n": "more than the stream from each other",
}


def made(name: str, folder: Path, **changes: Any) -> Any:
    return load_model(find_model(str(families.build(name, folder, **changes))))


@pytest.mark.parametrize("name", ADDING)
def test_layers_that_only_add(name: str, tmp_path: Path) -> None:
    found = adding(made(name, tmp_path))
    assert found.scales == dict.fromkeys(range(families.LAYERS), 1.0)
    assert found.why_not == {} and len(found.spans) == len(set(found.spans))


def test_what_is_added_may_be_scaled(tmp_path: Path) -> None:
    model = made("granite", tmp_path)
    scale = model.config.residual_multiplier
    assert scale != 1.0
    assert adding(model).scales == pytest.approx(dict.fromkeys(range(families.LAYERS), scale))


@pytest.mark.parametrize("name", NOT)
def test_layers_that_do_more(name: str, tmp_path: Path) -> None:
    model = made(name, tmp_path)
    found = adding(model)
    assert found.scales == {} and found.spans == [] == choices(model, ["span"])
    assert all(NOT[name] in why for why in found.why_not.values())
    if name in ("gemma2", "bloom"):
        with pytest.raises(InputError, match=rf"no layer of \w+ can be in one .*{NOT[name]}.*--blocks both"):
            check_blocks(model, ["attention", "mlp", "span"])


def test_a_norm_that_changes_next_to_nothing_is_seen(tmp_path: Path) -> None:
    """A norm of weight 1 gives a y of the same direction, and another size for each token."""
    model = made("gemma2", tmp_path)
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data.zero_()  # Gemma's norms multiply by 1 + weight
        layer.post_feedforward_layernorm.weight.data.zero_()
    assert adding(model).scales == {}


def test_half_precision_says_the_same(tmp_path: Path) -> None:
    model = made("granite", tmp_path).to(torch.bfloat16)
    scale = model.config.residual_multiplier
    assert adding(model).scales == pytest.approx(dict.fromkeys(range(families.LAYERS), scale), rel=0.02)


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return made("granite", tmp_path_factory.mktemp("granite"))


def test_what_a_span_adds_is_what_its_map_is_to_write(granite: Any) -> None:
    """With exactly that in the place of its first attention, and the rest dropped, nothing changes after the span."""
    ids = torch.arange(3, 27).reshape(2, 12)
    span, seen = Span(1, 2), {}

    def observe(block: Any, h: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
        seen[block] = (h.clone(), x.clone(), y.clone())

    assert span in adding(granite).spans  # before the hooks of a walk
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
    module = granite.get_submodule(attention_layers(granite)[1].module)
    with torch.inference_mode(), replaced(granite, by_part({span: DROPPED}), "normed"):
        module = granite.get_submodule(attention_layers(granite)[1].module)
        hook = module.register_forward_hook(lambda _m, _a, output: (y, *output[1:]))
        found = granite(input_ids=ids, output_hidden_states=True).hidden_states
        hook.remove()
    torch.testing.assert_close(found[3], every[3], rtol=1e-4, atol=1e-4)
    assert (seen[Span(1, 1)][2] - seen[span][2]).norm() > 0.1 * y.norm()


def test_a_map_stands_for_the_whole_span(granite: Any) -> None:
    """h + c (W u + b), and nothing else of its layers."""
    ids = torch.arange(3, 15)[None]
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(D, D, generator=generator), torch.randn(D, generator=generator)
    linear = LinearLayer(w.numpy(), b.numpy())
    with torch.inference_mode(), replaced(granite, by_part({Span(1, 2): linear}), "normed"):
        states = granite(input_ids=ids, output_hidden_states=True).hidden_states
    norm = granite.model.layers[1].input_layernorm
    with torch.inference_mode():
        expected = states[1] + granite.config.residual_multiplier * (norm(states[1]) @ w.T + b)
    torch.testing.assert_close(states[2], expected)
    torch.testing.assert_close(states[3], expected)
    assert (states[1] - expected).norm() > 0.1 * expected.norm()
