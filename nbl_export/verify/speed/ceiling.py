"""How fast the rewritten graph can be at best: arithmetic and bytes, counted from the graphs.

A pass multiplies every constant weight matrix once a token, and makes attention's two products over the whole
context; it reads every weight once, and the KV cache of every row. On a machine's measured roofline
(:mod:`.roofline`) that is a least time: large prefills are bound by multiplications, decode by memory. The ceiling is
the ratio base/linearized of those times; a measured speedup above it means fewer kernels and less overhead, or a
broken benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from nbl_export.export.lm_head import sliced_lm_head
from nbl_export.graph.cache import kv_bytes_per_token
from nbl_export.graph.io import load_graph
from nbl_export.graph.operators import weight_shape
from nbl_export.graph.regions import Region, find_regions
from nbl_export.verify.speed.values import GraphCost, Roofline


def ceiling(
    base: GraphCost, other: GraphCost, roofline: Roofline, phase: str, context: int, batch: int = 1
) -> float:
    """How many times as fast as ``base`` the graph ``other`` can be at best."""
    times = [roofline.seconds(cost.work(phase, context, batch)) for cost in (base, other)]
    return times[0] / times[1]


def graph_cost(path: Path) -> GraphCost:
    """Count the decoder graph at ``path``."""
    model = load_graph(path)
    head = sliced_lm_head(model)
    macs = read = last_macs = last_bytes = 0
    for node in model.graph:
        shape = weight_shape(node)
        if shape is not None:
            size = weight_bytes(node)
            macs += shape[0] * shape[1]
            read += size
            if node is head:
                last_macs, last_bytes = shape[0] * shape[1], size
    # Both products of an attention have the width of what its output projection reads.
    widths = [weight_shape(r.projection) for r in find_regions(model) if isinstance(r, Region)]
    attention = sum(2 * width[0] for width in widths if width is not None)
    return GraphCost(macs, attention, read, kv_bytes_per_token(model), last_macs, last_bytes)


def weight_bytes(node: ir.Node, least_rank: int = 1) -> int:
    """Bytes of the stored weights that the linear operator ``node`` reads, directly or by a view.

    Those of its matrix alone, without a bias, have at least rank 2.
    """
    stored = [tensor for value in node.inputs[1:] for tensor in _stored(value)]
    return sum(tensor.nbytes for tensor in stored if len(tensor.shape) >= least_rank)


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


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
