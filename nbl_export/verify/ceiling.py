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
from nbl_export.graph.io import load_graph


@dataclass(frozen=True)
class GraphCost:
    """Per token: multiply-adds with constant weights, multiply-adds of attention per token of context,
    bytes of weights read, bytes of KV cache per token of context."""

    weight_macs: int
    attention_macs_per_context: int
    weight_bytes: int
    kv_bytes_per_token: int

    def prefill_macs(self, tokens: int) -> int:
        """Multiply-adds of a prefill of ``tokens``: attention over the full square, as runtimes compute it."""
        return tokens * (self.weight_macs + self.attention_macs_per_context * tokens)

    def decode_bytes(self, context: int) -> int:
        """Bytes read for one token after ``context`` tokens, batch 1."""
        return self.weight_bytes + self.kv_bytes_per_token * context

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def graph_cost(path: Path) -> GraphCost:
    """Count the decoder graph at ``path``."""
    model = load_graph(path)
    macs = read = attention = 0
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            weight = _weight(node.inputs[1])
            if weight is not None:
                macs += weight.size
                read += weight.nbytes
        elif node.op_type == "Attention":
            query = node.inputs[0]
            assert query is not None and query.shape is not None
            heads, dim = query.shape[1], query.shape[3]
            if isinstance(heads, int) and isinstance(dim, int):
                attention += 2 * heads * dim
    return GraphCost(macs, attention, read, kv_bytes_per_token(model))


def _weight(value: ir.Value | None) -> ir.TensorProtocol | None:
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in ("Transpose", "Cast", "Identity"):
            return None
        value = node.inputs[0]
    return value.const_value if value is not None else None
