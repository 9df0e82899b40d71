"""The core of a layer is the first node on every path from its cache to the logits, however large the graph is."""

from __future__ import annotations

import random

import onnx_ir as ir
import pytest

from nbl_export.graph.cores import NotFound, Search, core_of


def value(name: str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["b", "s"]), type=ir.TensorType(ir.DataType.FLOAT))


def graph_of(edges: dict[str, list[str]], last: str) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A model whose node ``name`` reads ``edges[name]``, in that order; ``k``, ``v`` and ``input_ids`` are inputs."""
    inputs = {name: value(name) for name in ("k", "v", "input_ids")}
    values, nodes = dict(inputs), []
    for name, reads in edges.items():
        node = ir.node("Sum", [values[r] for r in reads], name=name)
        node.outputs[0].name = name
        values[name] = node.outputs[0]
        nodes.append(node)
    graph = ir.Graph(list(inputs.values()), [values[last]], nodes=nodes, opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=10), values


def core(edges: dict[str, list[str]], last: str) -> str:
    model, values = graph_of(edges, last)
    search = Search(model, values[last].producer())
    return str(core_of(search, (values["k"], values["v"])).name)


def by_definition(edges: dict[str, list[str]], last: str) -> str | None:
    """The first node that both reach and without which neither reaches the last."""

    def reached(starts: set[str], without: str = "") -> set[str]:
        found = set(starts)
        for name, reads in edges.items():
            if name != without and found & set(reads):
                found.add(name)
        return found

    both = reached({"k"}) & reached({"v"})
    if last not in both:
        return None
    return next((n for n in edges if n in both and last not in reached({"k", "v"}, n)), None)


@pytest.mark.parametrize("seed", range(200))
def test_any_graph_against_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    edges: dict[str, list[str]] = {}
    for i in range(rng.randrange(3, 14)):
        known = ["k", "v", "input_ids", *edges]
        edges[f"n{i}"] = rng.sample(
            known[-5:] if rng.random() < 0.7 else known, min(len(known), rng.choice([1, 2]))
        )
    last = f"n{len(edges) - 1}"
    expected = by_definition(edges, last)
    if "input_ids" not in {r for reads in edges.values() for r in reads}:
        edges["n0"].append("input_ids")
        expected = by_definition(edges, last)
    if expected is None:
        with pytest.raises(NotFound):
            core(edges, last)
    else:
        assert core(edges, last) == expected
