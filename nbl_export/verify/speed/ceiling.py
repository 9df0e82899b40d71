"""Count what graphs compute and read, and what a linear layer saves of that, in the least time that a machine allows.

A pass multiplies every constant weight matrix once a token, and makes attention's two products over the whole
context; it reads every weight once, and the KV cache of every row. A linear block no longer has its weights, its two
products and its keys and values, and has W. On a machine's roofline (Williams, Waterman, Patterson 2009) that is a
least time: large prefills are bound by multiplications, decode by memory. The ceiling is the ratio base/linearized of
those times; a measured speedup above it means fewer kernels and less overhead, or a broken benchmark.

Both rates of a machine are measured where the graphs are timed, in the same run and by the same number of threads:
arithmetic by large matrix products, in PyTorch and (on a CPU) in ONNX Runtime, whichever is faster; bandwidth by
STREAM's triad and by a sum, which only reads as a decoder reads its weights. The best of several repetitions counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

from nbl_export.blocks import Block, parts_in
from nbl_export.export.tidy import sliced_lm_head
from nbl_export.graph.branches import mlp_regions
from nbl_export.graph.cache import kv_bytes_per_token, kv_pairs, pair_bytes_per_token
from nbl_export.graph.io import load_graph
from nbl_export.graph.operators import Routed, captured, routed, weight_shape
from nbl_export.graph.regions import Region, find_regions
from nbl_export.linearize.plan import Plan
from nbl_export.machine import cores
from nbl_export.rewrite.planned import planned_attentions
from nbl_export.runtime.session import CPU, require_onnxruntime, session_options
from nbl_export.settings.making import Workload
from nbl_export.verify.speed.values import GraphCost, Machine, Roofline

# Larger than any cache: 128 MiB each.
_STREAM = 32 << 20
_PRODUCT = 1536
_REPEATS = 7


# graphs -------------------------------------------------------------------------------------------


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
    experts = {node: one for node in model.graph if (one := routed(node)) is not None}
    for node in model.graph:
        shape = weight_shape(node)
        if shape is not None and node not in experts:
            size = weight_bytes(node)
            macs += shape[0] * shape[1]
            read += size
            if node is head:
                last_macs, last_bytes = shape[0] * shape[1], size
    # Both products of an attention have the width of what its output projection reads.
    widths = [weight_shape(r.projection) for r in find_regions(model) if isinstance(r, Region)]
    attention = sum(2 * width[0] for width in widths if width is not None)
    counted = GraphCost(macs, attention, read, kv_bytes_per_token(model), last_macs, last_bytes)
    return _with_experts(counted, experts.values())


def _with_experts(cost: GraphCost, found: Collection[Routed]) -> GraphCost:
    """``cost`` with the experts that were ``found``: of each token, those that it is sent to."""
    if not found:
        return cost
    used = sum(one.parameters * one.share for one in found)
    share = used / sum(one.parameters for one in found)
    size = cost.expert_bytes + sum(one.bytes for one in found)
    return replace(cost, weight_macs=cost.weight_macs + round(used), expert_bytes=size, expert_share=share)


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


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all weights of the graph ``model``."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


# blocks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Savings:
    """What a graph costs, what each block saves of it when it is linear, and the milliseconds of workloads.

    ``stored`` are the bytes of all weights of the graph; ``without`` is what each block saves that is dropped.
    Milliseconds are the least ones by the roofline: a kernel that is slower than it allows saves more.
    """

    graph: GraphCost
    blocks: Mapping[Block, GraphCost]
    roofline: Roofline
    workloads: Sequence[Workload]
    stored: int
    without: Mapping[Block, GraphCost] = field(default_factory=dict)

    def left(self, linear: Iterable[Block]) -> GraphCost:
        """What is left of the graph with these blocks ``linear``."""
        left = self.graph
        for block in linear:
            # Of a span, all but the first part is dropped.
            first, *others = parts_in(block)
            left -= self.blocks[first]
            for part in others:
                left -= self.without[part]
        return left

    def weight_bytes(self, linear: Iterable[Block] = ()) -> int:
        """Bytes of the weights with these blocks ``linear``."""
        return self.stored - self.graph.stored_bytes + self.left(linear).stored_bytes

    def kv_bytes(self, linear: Iterable[Block] = ()) -> int:
        """Bytes of the KV cache that the largest workload fills."""
        tokens = max((w.batch * w.longest for w in self.workloads), default=0)
        return tokens * self.left(linear).kv_bytes_per_token

    def ms(self, linear: Iterable[Block] = ()) -> float:
        """Milliseconds of the workloads, weighted, with these blocks ``linear``."""
        left, fastest = self.left(linear), self.roofline.seconds

        def seconds(w: Workload) -> float:
            prefill = fastest(left.prefill(w.prefill, w.batch)) if w.prefill else 0.0
            return prefill + w.decode * fastest(left.decode(w.middle, w.batch))

        return 1e3 * sum(w.weight * seconds(w) for w in self.workloads)

    def saved_ms(self, block: Block, linear: Iterable[Block] = ()) -> float:
        """What ``block`` saves of that where others are ``linear`` already."""
        others = tuple(linear)
        return self.ms(others) - self.ms((*others, block))

    def speedup(self, linear: Iterable[Block]) -> float:
        """How many times as fast the workloads are (counted: at best) with these blocks ``linear``."""
        return self.ms() / self.ms(linear)


def block_savings(model: ir.Model, plan: Plan, rank: int | None = None) -> dict[Block, GraphCost]:
    """What each candidate of the ``plan`` saves of the decoder graph ``model`` with W, or its factors of ``rank``.

    A block that is not found saves nothing. Raises what :func:`.planned_attentions` raises.
    """
    width, pairs = plan.hidden_size, kv_pairs(model)
    w = width * width if rank is None else 2 * width * rank
    found = planned_attentions(model, find_regions(model), plan)
    saved: dict[Block, GraphCost] = dict.fromkeys(plan.candidates, GraphCost(0, 0, 0, 0))
    for region in [*found, *mlp_regions(model, found, plan.candidates, plan.layer_count)]:
        if not isinstance(region, Region):
            continue
        nodes = dict.fromkeys((*region.linear_nodes, region.projection))
        experts = {node: one for node in _between(region) if (one := routed(node)) is not None}
        shapes = {node: shape for node in nodes if (shape := weight_shape(node)) is not None}
        macs = sum(rows * columns for node, (rows, columns) in shapes.items() if node not in experts)
        last, products, cache = shapes.get(region.projection), 0, 0
        # W is stored as the block's last matrix is.
        of_w = weight_bytes(region.projection, 2) / (last[0] * last[1]) * w if last else 0.0
        if isinstance(region.layer, int):
            products = 2 * last[0] if last else 0
            cache = pair_bytes_per_token(pairs[region.pair]) if region.pair is not None else 0
        size = round(sum(weight_bytes(node) for node in nodes if node not in experts) - of_w)
        saved[region.layer] = _with_experts(GraphCost(macs - w, products, size, cache), experts.values())
    return saved


def _between(region: Region) -> list[ir.Node]:
    """The nodes of an MLP, from x to y; none of an attention."""
    found: dict[ir.Node, None] = {}
    stack = [] if isinstance(region.layer, int) else [region.outputs[0].value]
    while stack:
        node = stack.pop().producer()
        if node is not None and node not in found:
            found[node] = None
            stack += [v for v in (*node.inputs, *captured(node)) if v is not None and v not in region.inputs]
    return list(found)


# machines -----------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    """Seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_machine() -> Machine:
    """ONNX Runtime on the processor that this runs on, with its roofline."""
    return Machine(CPU, cores(), roofline=measure_roofline())


def measure_roofline(device: str = "cpu", dtype: str = "float32") -> Roofline:
    """Measure the machine that the process runs on; a second or two."""

    def rate(work: Callable[[], object], amount: float) -> float:
        def finished() -> None:
            work()
            if device == "cuda":
                torch.cuda.synchronize()

        return amount / min(timed(finished) for _ in range(_REPEATS))

    a, b = (torch.rand(_PRODUCT, _PRODUCT, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    products: list[Callable[[], object]] = [lambda: torch.mm(a, b, out=out)]
    if device == "cpu" and dtype == "float32":
        products.append(_ort_product())
    x, y, z = (torch.ones(_STREAM, device=device) for _ in range(3))
    triad = rate(lambda: torch.add(x, y, alpha=3.0, out=z), 3 * x.nbytes)
    read = rate(x.sum, x.nbytes)
    macs = max(rate(product, _PRODUCT**3) for product in products)
    threads = torch.get_num_threads() if device == "cpu" else None
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return Roofline(name, dtype, threads, macs, max(triad, read))


def _ort_product() -> Callable[[], object]:
    square = np.random.default_rng(0).random((_PRODUCT, _PRODUCT), dtype=np.float32)
    shape = f"float[{_PRODUCT},{_PRODUCT}]"
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 20]> g ({shape} a) => ({shape} c) {{ c = MatMul(a, b) }}'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(square, "b"))
    session = require_onnxruntime().InferenceSession(
        model.SerializeToString(), session_options(), providers=[CPU]
    )
    return lambda: session.run(None, {"a": square})
