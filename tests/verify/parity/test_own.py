"""What half precision costs PyTorch itself: against transformers' own half, and a limit that wrong maps exceed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from nbl_export.graph.precision import precision_of
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.linearize.swap import linearized
from nbl_export.models.load import in_precision
from nbl_export.runtime.torch import torch_stream
from nbl_export.verify.parity.decoder import compare_streams
from nbl_export.verify.parity.figures import Parity, gates_for
from nbl_export.verify.parity.own import OWN, pytorch_in_precision
from tests.fixtures_graph import plan_by_hand, ragged_rows

LAYERS = (1, 3)
STEPS = 3
ROWS = ragged_rows((20, 13), 500)
PRECISIONS = pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])


@pytest.fixture
def plan(stories_out: Path) -> Plan:
    return plan_by_hand(stories_out, LAYERS)


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
    assert own.prompt_lengths == (17, 10) and [s.step for s in own.steps] == [0, 1, 2, 3]
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


# a limit that wrong maps exceed -------------------------------------------------------------------


def scaled(layer: LinearLayer) -> LinearLayer:
    return replace(layer, w=layer.w * np.float32(1.05))


def without_bias(layer: LinearLayer) -> LinearLayer:
    return replace(layer, b=np.zeros_like(layer.b))


def with_nan(layer: LinearLayer) -> LinearLayer:
    w = layer.w.copy()
    w[3, 5] = np.nan
    return replace(layer, w=w)


def in_half_by(model: Any, plan: Plan, changed: Plan) -> Parity:
    """The model in float16 by a plan that is ``changed``, against float32 by the right one."""
    half = in_precision(model, "float16")
    with linearized(model, plan), linearized(half, changed):
        a, b = (torch_stream(m, plan.chosen) for m in (model, half))
        return compare_streams(a, b, ROWS, STEPS, gates_for("float16"))


@pytest.mark.parametrize("change", [scaled, without_bias, with_nan], ids=lambda c: c.__name__)
def test_wrong_maps_lose_more_than_half_precision_does(
    stories_model: Any, plan: Plan, change: Callable[[LinearLayer], LinearLayer]
) -> None:
    own = pytorch_in_precision(precision_of("fp16"), stories_model, plan, ROWS, STEPS)
    right = in_half_by(stories_model, plan, plan)
    assert right.failures() == right.failures_against(own, OWN) == []
    wrong = in_half_by(stories_model, plan, replace(plan, layers={**plan.layers, 1: change(plan.layers[1])}))
    (told,) = wrong.failures_against(own, OWN)
    assert told.startswith("mean |Δlogit| is ") and "PyTorch's own in this precision" in told
    # Of what is no number each gate says so by itself.
    assert len(wrong.failures()) >= 4 or change is not with_nan
