"""Hold a rewritten random decoder to its plain graph, in which the maps were put by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.settings.choices import FitInput
from tests.end_to_end.random_decoder_graphs import Pair, Written, written
from tests.end_to_end.random_decoders import VOCAB, Array, Choices, Weights
from tests.fixtures_graph import cpu_session, decode, pad_left, ragged_rows

STEPS = 2


def random_plan(
    c: Choices, weights: Weights, layers: Sequence[int], fit_input: FitInput, seed: int = 1
) -> Plan:
    """A plan of random maps; its probe is what the decoder of ``weights``, unquantized, computes."""
    rng = np.random.default_rng(seed)
    rows = ragged_rows((9, 6, 11), VOCAB, seed)
    ids, mask, positions = pad_left(rows)
    graph = written(replace(c, linear="Gemm") if c.quantized else c, weights)
    names = dict.fromkeys(name for tensors in graph.tensors for name in tensors)
    outputs = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    graph.proto.graph.output.extend(outputs)
    pairs = dict(zip(flat(graph.past), flat(graph.present), strict=True))
    runner = cpu_session(graph.proto)
    runs = [next(decode(runner, [row], empty(c, [row], pairs), pairs, 0)) for row in rows]

    def probe(which: int, later: Sequence[Any]) -> dict[int, Array]:
        return {
            i: np.concatenate([run[tensors[which]][0] for run in runs]) + np.float32(later[i])
            for i, tensors in enumerate(graph.tensors)
        }

    def linear() -> LinearLayer:
        w = rng.standard_normal((c.width, c.width)) / c.width**0.5
        if c.quantized:  # numbers that 4 bits hold exactly, with the ends of the range in every block
            w = rng.integers(-7, 8, (c.width, c.width)) / 16
            w[:, :2] = -8 / 16, 7 / 16
        return LinearLayer(w.astype(np.float32), rng.standard_normal(c.width).astype(np.float32))

    return Plan(
        model="random",
        hidden_size=c.width,
        layer_count=c.layers,
        fit_input=fit_input,
        criterion="by hand",
        ridge=0.0,
        calibration_tokens=sum(map(len, rows)),
        layers={i: linear() for i in layers},
        probe={"input_ids": ids, "attention_mask": mask, "position_ids": positions},
        probe_u=probe(0 if fit_input == "normed" else 1, [0] * c.layers),
        probe_y=probe(2, graph.later),
    )


def flat(pairs: Sequence[Pair]) -> list[str]:
    return [name for pair in pairs for name in pair]


def empty(c: Choices, rows: Sequence[Any], names: Iterable[str]) -> dict[str, Any]:
    return dict.fromkeys(names, np.zeros((len(rows), c.kv_heads, 0, c.head_size), dtype=np.float32))


def replaced(graph: Written, plan: Plan) -> ModelProto:
    """The plain graph, in which whoever reads what a layer of ``plan`` writes reads W u + b."""
    nodes = graph.proto.graph.node
    for i, linear in plan.layers.items():
        normed, residual, y = graph.tensors[i]
        for node in nodes:
            node.input[:] = [f"{y} by hand" if name == y else name for name in node.input]
        for name, array in (("W", linear.w.T), ("b", linear.b - np.float32(graph.later[i]))):
            stored = numpy_helper.from_array(np.ascontiguousarray(array), f"{y} {name}")
            graph.proto.graph.initializer.append(stored)
        place = next(place for place, node in enumerate(nodes) if y in node.output)
        u = normed if plan.fit_input == "normed" else residual
        nodes.insert(place, helper.make_node("Add", [f"{y} W u", f"{y} b"], [f"{y} by hand"]))
        nodes.insert(place, helper.make_node("MatMul", [u, f"{y} W"], [f"{y} W u"]))
    return graph.proto


def assert_computes(path: Path, c: Choices, weights: Weights, plan: Plan) -> None:
    """The graph at ``path`` gives the logits and caches of the plain one with the maps, in prefill and decode."""
    graph, steps = written(c, weights), STEPS if c.cache != "none" else 0
    kept = [i for i in plan.attention_layers if i < len(graph.past)]
    # Numbers are given anew, other names stay.
    places = range(len(kept)) if c.cache in ("usual", "numbered") else kept
    past, present = (flat([names[i] for i in places]) for names in (graph.past, graph.present))
    # Padding on the left moves positions that are counted; GroupQueryAttention has it on the right.
    ragged = c.positions == "input" and c.attention != "GroupQueryAttention"
    rows = ragged_rows((9, 6, 11) if ragged else (9, 9), VOCAB, seed=3)
    every = dict(zip(flat(graph.past), flat(graph.present), strict=True))
    shared = dict(zip(present, flat([graph.present[i] for i in kept]), strict=True))
    pairs = dict(zip(past, present, strict=True))
    rewritten = decode(cpu_session(path), rows, empty(c, rows, past), pairs, steps)
    by_hand = decode(cpu_session(replaced(graph, plan)), rows, empty(c, rows, every), every, steps)
    for step, (found, expected) in enumerate(zip(rewritten, by_hand, strict=True)):
        assert set(found) == {"logits", *present}
        for number, row in enumerate(rows):
            seen = len(row) - steps + step
            new = 1 if step else seen
            assert_near(found["logits"][number, -new:], expected["logits"][number, -new:])
            for name, old in shared.items():
                assert_near(found[name][number][:, -seen:], expected[old][number][:, -seen:])


def assert_near(found: Any, expected: Any) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
