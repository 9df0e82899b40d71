"""What each block of a graph costs, and what its linear layer saves of a workload.

Counted from the graph as the ceiling is (:mod:`.ceiling`): a linear block no longer has its weights, its two products
of attention and its keys and values, and has W. With a machine's roofline these are the least milliseconds of a
workload: a kernel that is slower than the roofline allows saves more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import onnx_ir as ir

from nbl_export.blocks import Block, parts_in
from nbl_export.graph.branches import mlp_regions
from nbl_export.graph.cache import kv_pairs, pair_bytes_per_token
from nbl_export.graph.operators import weight_shape
from nbl_export.graph.regions import Region, find_regions
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite.planned import planned_attentions
from nbl_export.settings.workload import Workload
from nbl_export.verify.speed.ceiling import weight_bytes
from nbl_export.verify.speed.values import GraphCost, Roofline


@dataclass(frozen=True)
class Savings:
    """What a graph costs, what each block saves of it when it is linear, and the milliseconds of workloads.

    ``stored`` are the bytes of all weights of the graph; ``without`` is what each block saves that is dropped.
    Milliseconds are the least ones by the roofline.
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
            left = less(left, self.blocks[first])
            for part in others:
                left = less(left, self.without[part])
        return left

    def weight_bytes(self, linear: Iterable[Block] = ()) -> int:
        """Bytes of the weights with these blocks ``linear``."""
        return self.stored - self.graph.weight_bytes + self.left(linear).weight_bytes

    def kv_bytes(self, linear: Iterable[Block] = ()) -> int:
        """Bytes of the KV cache that the largest workload fills."""
        tokens = max((w.batch * w.longest for w in self.workloads), default=0)
        return tokens * self.left(linear).kv_bytes_per_token

    def ms(self, linear: Iterable[Block] = ()) -> float:
        """Milliseconds of the workloads, weighted, with these blocks ``linear``."""
        left = self.left(linear)
        return 1e3 * sum(w.weight * _seconds(left, w, self.roofline) for w in self.workloads)

    def saved_ms(self, block: Block, linear: Iterable[Block] = ()) -> float:
        """What ``block`` saves of that where others are ``linear`` already."""
        others = tuple(linear)
        return self.ms(others) - self.ms((*others, block))

    def speedup(self, linear: Iterable[Block]) -> float:
        """How many times as fast the workloads are (counted: at best) with these blocks ``linear``."""
        return self.ms() / self.ms(linear)


def less(cost: GraphCost, saved: GraphCost) -> GraphCost:
    """``cost`` without what is ``saved``."""
    return GraphCost(**{f.name: getattr(cost, f.name) - getattr(saved, f.name) for f in fields(GraphCost)})


def _seconds(cost: GraphCost, workload: Workload, roofline: Roofline) -> float:
    prefill = roofline.seconds(cost.prefill(workload.prefill, workload.batch)) if workload.prefill else 0.0
    if not workload.decode:
        return prefill
    return prefill + workload.decode * roofline.seconds(cost.decode(workload.middle, workload.batch))


def block_savings(model: ir.Model, plan: Plan, rank: int | None = None) -> dict[Block, GraphCost]:
    """What each candidate of the ``plan`` saves of the decoder graph ``model`` with W, or its factors of ``rank``.

    A block that is not found saves nothing. Raises what :func:`.planned_attentions` raises.
    """
    width = plan.hidden_size
    w = width * width if rank is None else 2 * width * rank
    pairs = kv_pairs(model)
    found = planned_attentions(model, find_regions(model), plan)
    regions = [*found, *mlp_regions(model, found, plan.candidates, plan.layer_count)]
    saved: dict[Block, GraphCost] = dict.fromkeys(plan.candidates, GraphCost(0, 0, 0, 0))
    for region in regions:
        if not isinstance(region, Region):
            continue
        nodes = dict.fromkeys((*region.linear_nodes, region.projection))
        shapes = {node: shape for node in nodes if (shape := weight_shape(node)) is not None}
        macs = sum(rows * columns for rows, columns in shapes.values())
        size = sum(map(weight_bytes, nodes))
        last = shapes.get(region.projection)
        # W is stored as the block's last matrix is.
        of_w = weight_bytes(region.projection, 2) / (last[0] * last[1]) * w if last else 0.0
        products = cache = 0
        if isinstance(region.layer, int):
            products = 2 * last[0] if last else 0
            cache = pair_bytes_per_token(pairs[region.pair]) if region.pair is not None else 0
        saved[region.layer] = GraphCost(macs - w, products, round(size - of_w), cache)
    return saved


def stored_bytes(model: ir.Model) -> int:
    """Bytes of all weights of the graph ``model``."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
