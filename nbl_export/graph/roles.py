"""What the inputs of a graph mean: by their usual names, or, for a graph with names of its own, by what reads them.

Token ids choose rows of the largest table. Positions reach the rotary tables or choose rows of a table of positions;
the mask reaches neither. A wrong guess would not pass the proof of a rewrite, which runs the graph on known tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from nbl_export.batch.names import EMBEDDINGS, MASK, PIXELS, POSITIONS, TOKEN_TYPES, TOKENS, WRITE_INDICES
from nbl_export.files import parse_json
from nbl_export.graph.operators import SHAPE_ONLY, VIEWS, is_constant, readers

_NAMED = (TOKENS, EMBEDDINGS, PIXELS, MASK, POSITIONS, TOKEN_TYPES, WRITE_INDICES)
INPUTS_KEY = "nbl_export.inputs"  # metadata: the inputs that have names of their own, by their usual names
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
_ROTARY = ("Cos", "Sin")


def roles(model: ir.Model) -> dict[str, ir.Value]:
    """The inputs of the graph by their usual names; those that have no known meaning are left out."""
    found = {str(v.name): v for v in model.graph.inputs if v.name in _NAMED} | _remembered(model)
    others = [v for v in model.graph.inputs if v not in found.values() and _is_of_tokens(v)]
    if not found.keys() & {TOKENS, EMBEDDINGS, PIXELS} and (tokens := _tokens(others)) is not None:
        found[TOKENS] = tokens
        others.remove(tokens)
    if TOKENS not in found:
        return found
    placed = [v for v in others if _reaches_positions(v)]
    unplaced = [v for v in others if v not in placed]
    for name, left in ((POSITIONS, placed), (MASK, unplaced)):
        if name not in found and len(left) == 1:
            found[name] = left[0]
    return found


def remember_roles(model: ir.Model) -> None:
    """Write into the metadata what the inputs with own names mean: a rewritten graph may not show it any more."""
    own = {name: str(value.name) for name, value in roles(model).items() if value.name != name}
    if own:
        model.metadata_props[INPUTS_KEY] = json.dumps(own)


def _remembered(model: ir.Model) -> dict[str, ir.Value]:
    inputs = {v.name: v for v in model.graph.inputs}
    try:
        own = parse_json(model.metadata_props.get(INPUTS_KEY, "{}"))
    except ValueError:
        return {}
    named = own.items() if isinstance(own, dict) else ()
    return {name: inputs[str(value)] for name, value in named if name in _NAMED and str(value) in inputs}


def _is_of_tokens(value: ir.Value) -> bool:
    return value.dtype in _INTEGERS and value.shape is not None and len(value.shape) == 2


def _tokens(values: Sequence[ir.Value]) -> ir.Value | None:
    """The input that chooses rows of the table with the most; None if there is none, or two of that size."""
    sizes: dict[ir.Value, int] = {}
    for value in values:
        for node in _gathers([value], views_only=True):
            table = node.inputs[0]
            rows = (
                table.shape[0]
                if table is not None and table.shape is not None and len(table.shape) == 2
                else None
            )
            if isinstance(rows, int):
                sizes[value] = max(sizes.get(value, 0), rows)
    largest = [value for value, size in sizes.items() if size == max(sizes.values())]
    return largest[0] if len(largest) == 1 else None


def _reaches_positions(value: ir.Value) -> bool:
    return next(_gathers([value], views_only=False), None) is not None


def _gathers(values: Sequence[ir.Value], views_only: bool) -> Iterator[ir.Node]:
    """The Gathers of constant tables that ``values`` choose rows of; else also rotary operators that they reach."""
    stack, seen = list(values), set[ir.Node]()
    while stack:
        value = stack.pop()
        for node in readers(value):
            if node in seen or node.op_type in SHAPE_ONLY:
                continue
            seen.add(node)
            chosen = node.op_type == "Gather" and node.inputs[1] is value and is_constant(node.inputs[0])
            if chosen or (node.op_type in _ROTARY and not views_only):
                yield node
            elif not views_only or node.op_type in VIEWS:
                stack.extend(node.outputs)
