"""Make Scans of recurrences: over tokens, or over chunks of tokens with products of matrices within a chunk.

    S, tokens ─► Scan ─► y of every token, S after the last one

Where each value of a key decays by itself, each iteration is one token: the state [batch, heads, k, v] decays, takes
the token in, and is read. Where a head decays as a whole, an iteration is a chunk:

    S_t = a_t S_{t-1} + k_t ⊗ u_t,  y_t = q_tᵀ S_t,  a_t a number       in a chunk of C tokens that begins with S:

    Y  = ((Q Kᵀ) ∘ A) U + (a ∘ Q) S      A[t, s] = a_{s+1} … a_t for s ≤ t, else 0;  a[t] = a_1 … a_t
    S' = a[C] S + (A[C] ∘ K)ᵀ U

U is V, or for a delta rule the solution of (I + L) U = beta ∘ (V - (a ∘ K) S), L being beta ∘ A ∘ (K Kᵀ) below the
diagonal. Products of decays are exponentials of sums, each of its own numbers, all of one sign: nothing cancels, and
nothing is divided. (I + L)⁻¹ is put together from the inverses of blocks of 1, 2, 4 … tokens, as forward substitution
does it by blocks.

The last chunk is filled up with tokens that change nothing, and no chunk is longer than the text: a decode step
computes one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.export.recurrence import CHUNKED, RECURRENCE, SYMBOLIC_DOMAIN
from nbl_export.graph.nodes import Nodes

# Tokens of a chunk, and how often a block doubles until it is that long.
CHUNK = 32
_DOUBLINGS = CHUNK.bit_length() - 1
# The logarithm of a product of decays that is as good as none, 4e-11. The inverse multiplies three of them, and numbers
# near float32's smallest take a CPU a hundred times as long.
_LEAST = -24.0
_END = np.iinfo(np.int64).max
_SCANNED = ("whole", "Q", "K", "P", "U", "W")
_NAMES = ("decay", "query", "key", "value", "beta")


def in_chunks(node: ir.Node) -> tuple[list[ir.Node], ir.Value, ir.Value]:
    """The nodes that compute a recurrence, its y and the state after it.

    The inputs of ``node`` are the state [batch, heads, k, v], logarithms of the decay [batch, tokens, heads], queries
    and keys [batch, tokens, heads, k], values [batch, tokens, heads, v] and, for a delta rule, beta [batch, tokens,
    heads].
    """
    make = Nodes(str(node.name))
    state, *tokens = (value for value in node.inputs if value is not None)
    ints: Any = {"dtype": ir.DataType.INT64}
    flags: Any = {"dtype": ir.DataType.BOOL}
    count = make("Shape", tokens[3], start=1, end=2, **ints)
    size = make("Min", count, make.number([CHUNK]), **ints)
    rest = make("Mod", count, size, **ints)
    fill = make("Mod", make("Sub", size, rest, **ints), size, **ints)
    zero, one, minus, rows = (make.number([n]) for n in (0, 1, -1, -2))
    nothing = make.number(0.0, np.float32)
    pads = make("Concat", zero, fill, axis=0, **ints)

    def cut(value: ir.Value, rank: int) -> ir.Value:
        """[batch, tokens, heads, …] as [batch, chunks, heads, size, …]."""
        filled = make("Pad", value, pads, nothing, one)
        shape = make("Concat", zero, minus, size, make("Shape", value, start=2, **ints), axis=0, **ints)
        return make("Transpose", make("Reshape", filled, shape), perm=[0, 1, 3, 2, *range(4, rank + 1)])

    decay, query, key, value = (cut(t, 3 if n == 0 else 4) for n, t in enumerate(tokens[:4]))
    places = make("Range", make.number(0), make("Squeeze", size, zero, **ints), make.number(1), **ints)
    row, column = make("Unsqueeze", places, one, **ints), make("Unsqueeze", places, zero, **ints)
    within, below = make("GreaterOrEqual", row, column, **flags), make("Greater", row, column, **flags)
    sums, each = make("Cast", within, to=1), make("Unsqueeze", decay, minus)
    least = make.number(_LEAST, np.float32)

    def factors(logarithms: ir.Value) -> ir.Value:
        known = make("Greater", logarithms, least, **flags)
        return make("Where", known, make("Exp", logarithms), nothing)

    between = factors(make("MatMul", sums, make("Where", below, each, nothing)))
    products = make("Where", within, between, nothing)
    begun = factors(make("MatMul", sums, each))
    end = make.number([_END])
    turned = make("Transpose", key, perm=[0, 1, 2, 4, 3])
    scanned = [
        make("Slice", begun, minus, end, rows),
        make("Mul", query, begun),
        make("Mul", turned, make("Slice", products, minus, end, rows)),
        make("Mul", make("MatMul", query, turned), products),
    ]
    if len(tokens) < 5:
        scanned.append(value)
    else:
        beta = make("Unsqueeze", cut(tokens[4], 3), minus)
        known = make("Mul", make("Mul", make("MatMul", key, turned), products), beta)
        inverse = _inverse(make, make("Where", below, known, nothing), products, row, column)
        scanned.append(make("MatMul", inverse, make("Mul", beta, value)))
        scanned.append(make("MatMul", inverse, make("Mul", make("Mul", beta, begun), key)))
    scan = _scan([state, *scanned], _chunk(len(scanned)), node.name)
    make.made.append(scan)
    after, found = scan.outputs
    for output, name in ((after, "after"), (found, "found")):
        output.name, output.type = f"{make.prefix}/{name}", ir.TensorType(ir.DataType.FLOAT)
    ordered = make("Transpose", found, perm=[0, 1, 3, 2, 4])
    shape = make("Concat", zero, minus, make("Shape", tokens[3], start=2, **ints), axis=0, **ints)
    result = make("Slice", make("Reshape", ordered, shape), zero, count, one)
    return make.made, result, after


def _inverse(make: Nodes, known: ir.Value, products: ir.Value, row: ir.Value, column: ir.Value) -> ir.Value:
    """(I + L)⁻¹ of ``known``, the L below the diagonal: of two blocks, X and Z, and what is below, it is -Z L X.

    Where ``products`` of decays are nothing, it is nothing.
    """
    bools: Any = {"dtype": ir.DataType.BOOL}
    nothing = make.number(0.0, np.float32)
    kept = make("Greater", products, nothing, **bools)
    inverse = make("Cast", make("Equal", row, column, **bools), to=1)
    for doubling in range(_DOUBLINGS):
        block, double = make.number(1 << doubling), make.number(2 << doubling)
        (lower, left), (one, same) = (
            [make("Div", v, width, dtype=ir.DataType.INT64) for v in (row, column)]
            for width in (block, double)
        )
        pair = make("And", make("Equal", one, same, **bools), make("Greater", lower, left, **bools), **bools)
        between = make("Where", pair, known, nothing)
        if doubling:
            product = make("MatMul", make("MatMul", inverse, between), inverse)
            between = make("Where", kept, product, nothing)
        inverse = make("Sub", inverse, between)
    return inverse


def _scan(inputs: Sequence[ir.Value | None], body: ir.Graph, name: str | None) -> ir.Node:
    """A Scan over axis 1 of all ``inputs`` but the first, which is the state."""
    count = len(inputs) - 1
    axes = {"scan_input_axes": [1] * count, "scan_output_axes": [1]}
    told = {"body": body, "num_scan_inputs": count, **axes}
    return ir.node("Scan", inputs, told, num_outputs=2, name=name)


def _chunk(count: int) -> ir.Graph:
    """One chunk: the state before it to the state after it, and y."""
    make, inputs = Nodes("chunk"), _inputs([f"chunk/{name}" for name in ("state", *_SCANNED[:count])])
    state, whole, query, key, alike, learned, *known = inputs
    for seen in known:
        learned = make("Sub", learned, make("MatMul", seen, state))
    result = make("Add", make("MatMul", alike, learned), make("MatMul", query, state))
    after = make("Add", make("Mul", whole, state), make("MatMul", key, learned))
    return ir.Graph(inputs, [after, result], nodes=make.made, name="chunk")


def _token(count: int) -> ir.Graph:
    """One token, of a delta rule with beta: the state before it to the state after it, and y."""
    make, inputs = Nodes("recurrence"), _inputs(["state", *_NAMES[:count]])
    state, decay, query, key, value, *beta = inputs
    decayed = make("Mul", state, decay, named="decayed")
    if beta:
        row = make("Transpose", key, named="key_row", perm=[0, 1, 3, 2])
        known = make("MatMul", row, decayed, named="known")
        value = make("Mul", make("Sub", value, known, named="new"), beta[0], named="learned")
    added = make("Mul", key, value, named="added")
    after = make("Add", decayed, added, named="after")
    read = make("MatMul", query, after, named="read")
    return ir.Graph(inputs, [after, read], nodes=make.made, name="recurrence")


def _inputs(names: Sequence[str]) -> list[ir.Value]:
    return [ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in names]


def make_scans(model: ir.Model) -> None:
    """Replace every recurrence of :func:`~nbl_export.export.recurrence.recurrence` in ``model`` by a Scan."""
    for node in [
        n for n in model.graph if n.domain == SYMBOLIC_DOMAIN and n.op_type in (CHUNKED, RECURRENCE)
    ]:
        if node.op_type == CHUNKED:
            nodes, result, after = in_chunks(node)
        else:
            nodes = [_scan(node.inputs, _token(len(node.inputs) - 1), node.name)]
            after, result = nodes[0].outputs
        for made in nodes:
            made.metadata_props.update(node.metadata_props)
        node.append(nodes)
        for old, new in zip(node.outputs, (result, after), strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
