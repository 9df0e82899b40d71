"""How fast the rewritten graph can be at best: arithmetic and bytes, counted from the graphs.

Prefill is bound by multiplications: every constant weight matrix once a token, and attention's two
products over the whole context. Decode is bound by memory: every weight and the whole KV cache are
read once a token. The ceiling is the ratio base/linearized of that count; a measured speedup above
it means fewer kernels and less overhead, or a broken benchmark.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from nbl_export.graph.cache import kv_bytes_per_token
from nbl_export.graph.head import kept_head
from nbl_export.graph.io import load_graph
from nbl_export.graph.operators import weight_shape
from nbl_export.graph.regions import AttentionRegion, find_regions


@dataclass(frozen=True)
class GraphCost:
    """Per token: multiply-adds with constant weights, multiply-adds of attention per token of context,
    bytes of weights read, bytes of KV cache per token of context; and those multiply-adds with weights that
    only the last token of a prefill needs, since they make its logits."""

    weight_macs: int
    attention_macs_per_context: int
    weight_bytes: int
    kv_bytes_per_token: int
    last_macs: int = 0

    def prefill_macs(self, tokens: int) -> int:
        """Multiply-adds of a prefill of ``tokens``: attention over the full square, as runtimes compute it."""
        every = self.weight_macs - self.last_macs
        return tokens * (every + self.attention_macs_per_context * tokens) + self.last_macs

    def decode_bytes(self, context: int) -> int:
        """Bytes read for one token after ``context`` tokens, batch 1."""
        return self.weight_bytes + self.kv_bytes_per_token * context

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def graph_cost(path: Path) -> GraphCost:
    """Count the decoder graph at ``path``."""
    model = load_graph(path)
    head = kept_head(model)
    macs = read = last = 0
    for node in model.graph:
        shape = weight_shape(node)
        if shape is not None:
            macs += shape[0] * shape[1]
            last += shape[0] * shape[1] if node is head else 0
            read += sum(w.nbytes for w in _weights(node))
    # Both products of an attention have the width of what its output projection reads.
    widths = [weight_shape(r.projection) for r in find_regions(model) if isinstance(r, AttentionRegion)]
    attention = sum(2 * width[0] for width in widths if width is not None)
    return GraphCost(macs, attention, read, kv_bytes_per_token(model), last)


def _weights(node: ir.Node) -> list[ir.TensorProtocol]:
    """The stored matrices and vectors that a linear map reads, where it reads them directly or by a view."""
    found = []
    for value in node.inputs[1:]:
        tensors = _stored(value)
        found += [t for t in tensors if len(t.shape)]
    return found


def _stored(value: ir.Value | None) -> list[ir.TensorProtocol]:
    if value is None:
        return []
    if value.const_value is not None:
        return [value.const_value]
    node = value.producer()
    if node is None:
        return []
    inputs = node.inputs if node.op_type == "DequantizeLinear" else node.inputs[:1]
    return [t for v in inputs for t in _stored(v)]
