"""Tiny models like Llama with random linear layers, and an empty tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from nbl_export.blocks import Block
from nbl_export.convert.gguf import Fields
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.models.layers import hidden_size, layer_count
from nbl_export.packages import part
from nbl_export.stages.convert import FORMS
from nbl_export.verify.parity.compare import Text, compare
from nbl_export.verify.parity.figures import Parity, gates_for
from nbl_export.verify.parity.pytorch import record_pytorch
from tests.fixtures_graph import ragged_rows, recorded


@pytest.fixture
def no_tokenizer() -> Fields:
    """The fields of a file whose readers have token ids alone."""
    from gguf import GGUFValueType

    return [("tokenizer.ggml.model", "none", GGUFValueType.STRING, None)]


@pytest.fixture
def random_plan() -> Callable[[Any, Sequence[Block]], Plan]:
    """A plan with random W and b, large enough to matter, for these blocks of a model."""

    def made(model: Any, blocks: Sequence[Block]) -> Plan:
        d, generator = hidden_size(model), np.random.default_rng(5)

        def linear() -> LinearLayer:
            w = generator.normal(size=(d, d)) / np.sqrt(d)
            return LinearLayer(w.astype(np.float32), generator.normal(size=d).astype(np.float32))

        empty = Plan(
            model="of a test",
            hidden_size=d,
            layer_count=layer_count(model),
            fit_input="normed",
            criterion="by hand",
            ridge=1e-6,
            calibration_tokens=1,
            layers={},
            probe={},
            probe_u={},
            probe_y={i: np.zeros((0, d), np.float32) for i in range(layer_count(model))},
        )
        return empty.with_replaced({block: linear() for block in blocks})

    return made


def needs(to: str) -> pytest.MarkDecorator:
    """Skips a test where the engine of a form is not."""
    form = FORMS[to]
    return pytest.mark.skipif(not form.is_here(), reason=f"needs {form.engine}: {part(form.package).pip}")


def assert_as_in_pytorch(open_stream: Callable[[], Any], model: Any, plan: Plan) -> None:
    """The stream computes what PyTorch does with ``plan``, and keeps keys and values of the attention layers alone."""
    found = stream_parity(open_stream(), model, plan)
    assert found.failures() == [] and all(step.kv_max_rel > 0 for step in found.steps)
    stream = open_stream()
    stream.prefill(ragged_rows([5], model.config.vocab_size))
    assert stream.kv_layers == plan.attention_layers and len(stream.cache()[0]) == len(plan.attention_layers)


def stream_parity(stream: Any, model: Any, plan: Plan | None, steps: int = 4) -> Parity:
    rows = ragged_rows([40, 9, 23], model.config.vocab_size)
    return compare(
        record_pytorch(model, plan, Text(rows, steps)), recorded(stream, rows, steps), gates_for("float32")
    )


# What a file may have that it must not, by what is wrong with layer 2.
WRONG: dict[str, Callable[[Plan], LinearLayer]] = {
    "scaled W": lambda plan: LinearLayer(plan.layers[2].w * np.float32(1.01), plan.layers[2].b),
    "no bias": lambda plan: LinearLayer(plan.layers[2].w, np.zeros_like(plan.layers[2].b)),
    "another layer": lambda plan: plan.layers[0],
}


def wrongly(change: str, plan: Plan) -> Plan:
    """``plan`` with what is wrong in it."""
    return replace(plan, layers={**plan.layers, 2: WRONG[change](plan)})
