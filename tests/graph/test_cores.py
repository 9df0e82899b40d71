"""The core of a layer is the first node on every path from its cache to the logits, however large the graph is."""

from __future__ import annotations

import random
import time

import onnx_ir as ir
import pytest

from nbl_export.graph.cores import NotFound, Search, core_of, reach


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


def test_where_keys_and_values_meet() -> None:
    edges = {
        "q": ["input_ids"],
        "s": ["q", "k"],
        "softmax": ["s"],
        "p": ["softmax", "v"],
        "o": ["p"],
        "out": ["o"],
    }
    assert core(edges, "out") == "p"


def test_a_path_around_the_first_meeting() -> None:
    edges = {"a": ["k", "v"], "b": ["k"], "c": ["a", "b"], "out": ["c"]}
    assert core(edges, "out") == "c"


def test_no_path() -> None:
    with pytest.raises(NotFound):
        core({"a": ["k"], "out": ["input_ids"]}, "out")


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


def test_two_long_ways_take_no_longer_than_one() -> None:
    """Each node of either way is a candidate, and no node but the last is on both."""
    edges: dict[str, list[str]] = {"a0": ["k", "v", "input_ids"], "b0": ["k", "v"]}
    for i in range(1, 3000):
        edges[f"a{i}"], edges[f"b{i}"] = [f"a{i - 1}"], [f"b{i - 1}"]
    edges["out"] = ["a2999", "b2999"]
    start = time.monotonic()
    assert core(edges, "out") == "out"
    assert time.monotonic() - start < 5


def test_what_values_flow_into() -> None:
    model, values = graph_of({"a": ["k"], "b": ["a"], "c": ["v"]}, "b")
    assert {node.name for node in reach([values["k"]])} == {"a", "b"}
    assert model.graph.num_nodes() == 3
