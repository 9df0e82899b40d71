"""The recurrence of a state over tokens as a Scan: standard operators only, for any number of tokens.

    S, tokens ─► Scan ─► y of every token, S after the last one

Each iteration is one token: the state [batch, heads, k, v] decays, takes the token in, and is read.
"""

from __future__ import annotations

import onnx_ir as ir

from nbl_export.export.chunks import in_chunks
from nbl_export.export.recurrence import CHUNKED, RECURRENCE
from nbl_export.export.symbols import SYMBOLIC_DOMAIN

_NAMES = ("decay", "query", "key", "value", "beta")


def make_scans(model: ir.Model) -> None:
    """Replace every recurrence of :func:`~nbl_export.export.recurrence.recurrence` in ``model`` by a Scan."""
    for node in [n for n in model.graph if (n.domain, n.op_type) == (SYMBOLIC_DOMAIN, CHUNKED)]:
        nodes, result, after = in_chunks(node)
        for made in nodes:
            made.metadata_props.update(node.metadata_props)
        node.append(nodes)
        _put_in(model, node, (result, after))
    for node in [n for n in model.graph if (n.domain, n.op_type) == (SYMBOLIC_DOMAIN, RECURRENCE)]:
        tokens = len(node.inputs) - 1
        scan = ir.node(
            "Scan",
            [*node.inputs],
            {
                "body": _body(delta=tokens == len(_NAMES)),
                "num_scan_inputs": tokens,
                "scan_input_axes": [1] * tokens,
                "scan_output_axes": [1],
            },
            num_outputs=2,
            name=node.name,
            metadata_props=dict(node.metadata_props),
        )
        node.append(scan)
        _put_in(model, node, (scan.outputs[1], scan.outputs[0]))


def _put_in(model: ir.Model, node: ir.Node, found: tuple[ir.Value, ir.Value]) -> None:
    for old, new in zip(node.outputs, found, strict=True):
        new.name, new.shape, new.type = old.name, old.shape, old.type
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _body(delta: bool) -> ir.Graph:
    def tensor(name: str) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))

    names = _NAMES if delta else _NAMES[:-1]
    state, *tokens = inputs = [tensor(name) for name in ("state", *names)]
    decay, query, key, value = tokens[:4]
    nodes: list[ir.Node] = []

    def emit(op: str, *args: ir.Value, name: str, **attributes: list[int]) -> ir.Value:
        node = ir.node(op, list(args), attributes, name=f"recurrence/{name}")
        node.outputs[0].name, node.outputs[0].type = f"recurrence/{name}", ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
        return node.outputs[0]

    decayed = emit("Mul", state, decay, name="decayed")
    if delta:
        row = emit("Transpose", key, name="key_row", perm=[0, 1, 3, 2])
        known = emit("MatMul", row, decayed, name="known")
        value = emit("Mul", emit("Sub", value, known, name="new"), tokens[4], name="learned")
    added = emit("Mul", key, value, name="added")
    after = emit("Add", decayed, added, name="after")
    read = emit("MatMul", query, after, name="read")
    return ir.Graph(inputs, [after, read], nodes=nodes, name="recurrence")
