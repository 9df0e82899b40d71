"""Fuse a traced graph to onnxruntime's own operators: GroupQueryAttention, and residual additions with their norms.

    before                                                 after
    q, k ─► Reshape ─► Transpose ─► RotaryEmbedding ─┐     q, k ─► RotaryEmbedding ─┐
    v ────► Reshape ─► Transpose ────────────────────┤     v, past, lengths of rows ┤
    past ─► Concat ─► present ────────► Attention(mask)    GroupQueryAttention ─► y, present

GroupQueryAttention skips masked future positions, writes new keys and values into a cache that is bound as past and
present at once, and reads queries in the layout of the projections. It takes no mask: rows are padded on the right,
and a query sees the keys up to its own position, or a sliding window of them.

1. *Find.* The attention of each KV pair, which must be one `Attention` node.
2. *Prove.* Its mask is computed for prompts, later chunks and a step at the maximum length, and must be that mask.
3. *Replace.* Masks, transposes and copies that are no longer read are removed.

    h, y ─► Add ─► h' ─► RMSNormalization              h, y ─► SkipSimplifiedLayerNormalization ─► norm, h'

LayerNormalization becomes SkipLayerNormalization. onnxruntime's own optimizer fuses these in older graphs but does not
know RMSNormalization. The operators are in onnxruntime's docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch import EMBEDDINGS, MASK, POSITIONS, TOKENS
from nbl_export.errors import InputError
from nbl_export.graph.cache import KVPair, kv_pairs
from nbl_export.graph.io import int64_initializer
from nbl_export.graph.operators import MICROSOFT, int_attribute, is_constant, remove_unused
from nbl_export.runtime.intermediates import compute_tensors

_I32, _I64 = ir.DataType.INT32, ir.DataType.INT64
_HEADS_FIRST = (0, 2, 1, 3)  # [batch, tokens, heads, head_dim] to [batch, heads, tokens, head_dim] and back
_SIZES = 8  # the operator needs a head_dim that is a multiple of this
_EDGE = 6  # tokens of the chunks that a mask is checked on
_FUSED = {
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
    "LayerNormalization": "SkipLayerNormalization",
}
_SUM = 3  # the index of the output that is the sum


def group_queries(model: ir.Model, longest: int) -> None:
    """Replace every attention of the decoder graph by a GroupQueryAttention, in place.

    The cache of the given graph grows by concatenation. ``longest`` is the maximum number of tokens. Raises
    :class:`InputError` for attention that this operator cannot compute; the graph is then unusable.
    """
    found = {_attention(pair): pair for pair in kv_pairs(model)}
    windows = _windows(
        model, {str(node.inputs[3].name): pair for node, pair in found.items() if node.inputs[3]}, longest
    )
    lengths = _lengths(model)
    for node, pair in found.items():
        _replace(model.graph, node, pair, windows, lengths)
    model.opset_imports[MICROSOFT] = 1
    model.graph.sort()
    remove_unused(model)


def unsupported_by_gqa(who: str, why: str) -> InputError:
    """The error for attention that GroupQueryAttention cannot compute."""
    return InputError(
        f"{who} {why}, which onnxruntime's GroupQueryAttention does not compute: use --kv-cache concat."
    )


def check_sizes(who: str, key: int, value: int) -> None:
    """Raise :class:`InputError` for a head_dim of keys and values that the operator does not support."""
    if key != value or key % _SIZES:
        raise unsupported_by_gqa(who, f"has head_dim {key} for keys and {value} for values")


def _refuse(pair: KVPair, why: str) -> InputError:
    return unsupported_by_gqa(f"Layer {pair.index}", why)


# 1 -----------------------------------------------------------------------------------------------


def _attention(pair: KVPair) -> ir.Node:
    check_sizes(f"Layer {pair.index}", pair.geometry(0)[1], pair.geometry(1)[1])
    readers = {u.node for u in pair.present[0].uses() if u.node.op_type == "Attention"}
    node = next(iter(readers), None)
    if (
        node is None
        or len(readers) != 1
        or any(_grown(present) is None for present in pair.present)
        or tuple(node.inputs[1:3]) != pair.present
        or len([v for v in node.inputs if v is not None]) != 4
    ):
        raise _refuse(pair, "has attention that is not one Attention node on its cache")
    return node


def _grown(present: ir.Value) -> ir.Value | None:
    """The new keys or values that a growing cache was extended by."""
    node = present.producer()
    return node.inputs[1] if node is not None and node.op_type == "Concat" and len(node.inputs) == 2 else None


# 2 -----------------------------------------------------------------------------------------------


def _windows(model: ir.Model, masks: Mapping[str, KVPair], longest: int) -> Mapping[str, int | None]:
    """By mask name, the number of keys that a query sees including its own; None for all up to its own."""
    windows = {n: int(mask.sum()) for n, mask in _compute(model, masks, longest - 1, 1).items()}
    edges = {0, _EDGE, *(max(0, w - _EDGE // 2) for w in windows.values())}
    for past, tokens in [(longest - 1, 1), *((past, _EDGE) for past in edges if past + _EDGE <= longest)]:
        query, key = past + np.arange(tokens)[:, None], np.arange(past + tokens)[None]
        for name, mask in _compute(model, masks, past, tokens).items():
            if not np.array_equal(mask[0, 0], (key <= query) & (key > query - windows[name])):
                raise _refuse(masks[name], "has a mask that is neither causal nor a sliding window")
    return {name: None if window >= longest else window for name, window in windows.items()}


def _compute(
    model: ir.Model, masks: Mapping[str, KVPair], past: int, tokens: int
) -> dict[str, NDArray[np.bool_]]:
    """The ``masks`` [1, 1, tokens, past + tokens] for one row of ``tokens`` after ``past``."""
    row: dict[str, NDArray[Any]] = {
        TOKENS: np.zeros((1, tokens), dtype=np.int64),
        POSITIONS: past + np.arange(tokens, dtype=np.int64)[None],
        MASK: np.ones((1, past + tokens), dtype=np.int64),
    }
    given = {str(v.name): v for v in model.graph.inputs}
    if EMBEDDINGS in given:
        row[EMBEDDINGS] = np.zeros((1, tokens, 1), dtype=np.float32)
    # A mask depends on the length of the cache, not on its values.
    cache = np.zeros((1, 1, past, 1), dtype=np.float32)
    row |= {str(value.name): cache for pair in kv_pairs(model) for value in pair.past}
    (found,) = compute_tensors(model, list(masks), [row])
    for name, mask in found.items():
        if mask.dtype != np.bool_ or mask.shape != (1, 1, tokens, past + tokens):
            raise _refuse(masks[name], "adds values to its scores")
    return found


# 3 -----------------------------------------------------------------------------------------------


def _lengths(model: ir.Model) -> tuple[ir.Value, ir.Value]:
    """The index of each row's last token [batch] and the padded length [], both int32 as the operator needs them."""
    graph = model.graph
    mask = next(v for v in graph.inputs if v.name == MASK)
    one = int64_initializer(graph, "lengths.one", 1)
    ones = int64_initializer(graph, "lengths.axis", [1])

    def emit(op: str, inputs: list[ir.Value], dtype: ir.DataType, shape: list[Any], **more: Any) -> ir.Value:
        node = ir.node(op, inputs, more)
        graph.append(node)
        return _typed(node.outputs[0], dtype, shape)

    batch = mask.shape[0] if mask.shape is not None else None
    counted = emit("ReduceSum", [mask, ones], _I64, [batch], keepdims=0)
    last = emit("Cast", [emit("Sub", [counted, one], _I64, [batch])], _I32, [batch], to=int(_I32))
    total = emit("Gather", [emit("Shape", [mask], _I64, [2]), one], _I64, [], axis=0)
    return last, emit("Cast", [total], _I32, [], to=int(_I32))


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    pair: KVPair,
    windows: Mapping[str, int | None],
    lengths: tuple[ir.Value, ir.Value],
) -> None:
    kv_heads, size = pair.geometry()
    query, mask = node.inputs[0], node.inputs[3]
    assert query is not None and query.shape is not None and mask is not None
    heads, window = query.shape[1], windows[str(mask.name)]
    if not isinstance(heads, int) or heads % kv_heads:
        raise _refuse(pair, f"has {heads} query heads for {kv_heads} key heads")
    new = [value for value in map(_grown, pair.present) if value is not None]
    flat = [_flat(graph, query, heads, size), *(_flat(graph, value, kv_heads, size) for value in new)]
    settings: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads}
    if "scale" in node.attributes:
        settings["scale"] = node.attributes["scale"].as_float()
    if window is not None:
        settings["local_window_size"] = window
    grouped = ir.node(
        "GroupQueryAttention",
        [*flat, *pair.past, *lengths],
        settings,
        domain=MICROSOFT,
        num_outputs=3,
        name=node.name,
    )
    node.prepend(grouped)
    y, *present = grouped.outputs
    _typed(y, query.dtype, [None, None, heads * size])
    for old, made in zip(pair.present, present, strict=True):
        made.name, made.type, made.shape = old.name, old.type, old.shape
        old.name = f"{old.name}.grown"
        ir.convenience.replace_all_uses_with(old, made, replace_graph_outputs=True)
    _reconnect(graph, node.outputs[0], y, heads, size)


def _flat(graph: ir.Graph, value: ir.Value, heads: int, size: int) -> ir.Value:
    """``value`` [batch, heads, tokens, size] as [batch, tokens, heads · size], without its Transpose if it has one."""
    node = value.producer()
    assert node is not None
    if node.op_type == "RotaryEmbedding" and node.inputs[0] is not None:
        inputs = [_flat(graph, node.inputs[0], heads, size), *node.inputs[1:]]
        attributes = {n: a for n, a in node.attributes.items() if n != "num_heads"}
        rotated = ir.node("RotaryEmbedding", inputs, {**attributes, "num_heads": heads})
        node.prepend(rotated)
        return _typed(rotated.outputs[0], value.dtype, [None, None, heads * size])
    if _is_transpose(node) and node.inputs[0] is not None:
        rows = node.inputs[0]
        made = rows.producer()
        source = made.inputs[0] if made is not None and made.op_type == "Reshape" else None
        if (
            source is not None
            and source.shape is not None
            and len(source.shape) == 3
            and source.shape[2] == heads * size
        ):
            return source
    else:
        turn = ir.node("Transpose", [value], {"perm": _HEADS_FIRST})
        node.append(turn)
        rows, node = _typed(turn.outputs[0], value.dtype, [None, None, heads, size]), turn
    reshape = ir.node(
        "Reshape", [rows, int64_initializer(graph, f"rows.{heads * size}", [0, 0, heads * size])]
    )
    node.append(reshape)
    return _typed(reshape.outputs[0], value.dtype, [None, None, heads * size])


def _reconnect(graph: ir.Graph, before: ir.Value, y: ir.Value, heads: int, size: int) -> None:
    """Connect ``y`` [batch, tokens, heads · size] to the readers of ``before`` [batch, heads, tokens, size]."""
    turns = [u.node for u in before.uses()]
    flattened = [u.node for turn in turns if _is_transpose(turn) for u in turn.outputs[0].uses()]
    if len(flattened) == len(turns) and all(_flattens(n, heads * size) for n in flattened):
        for node in flattened:
            ir.convenience.replace_all_uses_with(node.outputs[0], y)
        return
    made = y.producer()
    assert made is not None
    reshape = ir.node("Reshape", [y, int64_initializer(graph, f"heads.{heads}.{size}", [0, 0, heads, size])])
    turn = ir.node(
        "Transpose", [_typed(reshape.outputs[0], y.dtype, [None, None, heads, size])], {"perm": _HEADS_FIRST}
    )
    made.append([reshape, turn])
    _typed(turn.outputs[0], y.dtype, [None, heads, None, size])
    ir.convenience.replace_all_uses_with(before, turn.outputs[0])


def _is_transpose(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == _HEADS_FIRST


def _flattens(node: ir.Node, width: int) -> bool:
    shape = node.outputs[0].shape
    return node.op_type == "Reshape" and shape is not None and len(shape) == 3 and shape[2] == width


def _typed(value: ir.Value, dtype: ir.DataType | None, shape: list[Any]) -> ir.Value:
    value.type = ir.TensorType(dtype) if dtype is not None else None
    value.shape = ir.Shape(shape)
    return value


# Norms -------------------------------------------------------------------------------------------


def fuse_norms(model: ir.Model) -> int:
    """Fuse every norm of a residual stream [batch, tokens, d], in place; returns the number of fused norms."""
    found: dict[ir.Node, ir.Node] = {}
    for node in model.graph:
        if (added := _added(node)) is not None:
            found.setdefault(added, node)  # of two norms of one stream the first has the sum
    for added, node in found.items():
        epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
        fused = ir.node(
            _FUSED[node.op_type],
            [*added.inputs, *node.inputs[1:]],
            {"epsilon": epsilon},
            domain=MICROSOFT,
            num_outputs=_SUM + 1,
            name=node.name,
        )
        node.prepend(fused)
        for old, index in ((node.outputs[0], 0), (added.outputs[0], _SUM)):
            new = fused.outputs[index]
            new.name, new.type, new.shape = old.name, old.type, old.shape
            old.name = f"{old.name}.apart"
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        for unused in fused.outputs[1:_SUM]:
            unused.name = ""
    if found:
        model.opset_imports[MICROSOFT] = 1
        model.graph.sort()
        remove_unused(model)
    return len(found)


def _added(norm: ir.Node) -> ir.Node | None:
    """The Add to a residual stream whose last dimension ``norm`` normalizes; None for any other node."""
    value = norm.inputs[0] if norm.op_type in _FUSED and norm.domain in ("", "ai.onnx") else None
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Add" or int_attribute(norm, "axis", -1) not in (-1, 2):
        return None
    shapes = [None if v is None or v.shape is None else v.shape for v in node.inputs]
    if any(s is None or len(s) != 3 or s[2] != shapes[0][2] for s in shapes):  # type: ignore[index]
        return None
    # Shapes must be equal: learned positions are broadcast over rows, and a bias is one vector.
    if any(is_constant(v) for v in node.inputs) or shapes[0] != shapes[1]:
        return None
    # The stream is read elsewhere, too. A sum of two branches, as of experts and a shared one, is what a block writes,
    # and has to be found.
    return node if any(v is not None and len(v.uses()) > 1 for v in node.inputs) else None
