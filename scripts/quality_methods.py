"""Ways to make a model smaller without training, as bench_quality.py --compare compares them: what each cuts and saves.

NBL          the paper's method: attention layers by the CCA bound, plain LMMSE (arXiv 2505.21077)
attention drop   attention layers left out, by the loss of each alone (LLM-Drop's form, arXiv 2406.15786)
block drop   whole layers left out, one after the other by the smallest loss (SLEB, arXiv 2402.09025)
bypass       one affine map for a run of layers, fitted by least squares between the residual streams before and
             after it; the run is where they differ least in angle (ReplaceMe's form, arXiv 2505.02819)
attention, MLPs, spans, all   ours: greedy search over blocks, plain LMMSE; all by loss for what is saved
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from nbl_export import api
from nbl_export.blocks import ATTENTION, PARTS, SPAN, Block, Mlp, all_parts, attentions, part_of, parts_in
from nbl_export.calibrate.moments import load_moments
from nbl_export.calibrate.text import load_text
from nbl_export.files import read_json
from nbl_export.graph.io import load_graph
from nbl_export.linearize.fits import as_layer
from nbl_export.linearize.lmmse import fit_lmmse
from nbl_export.linearize.loss import LossMeter, loss_of_plan
from nbl_export.linearize.plan import DROPPED, LinearLayer, Replacement, by_part
from nbl_export.linearize.selection import Loss, Scores
from nbl_export.models.layers import block_stack
from nbl_export.records import from_json
from nbl_export.settings.choices import DEFAULT_RIDGE
from nbl_export.settings.workload import workload_of
from nbl_export.stages.select.choose import Choosing
from nbl_export.verify.speed.ceiling import graph_cost
from nbl_export.verify.speed.roofline import measure_roofline
from nbl_export.verify.speed.savings import Savings, block_savings, less, stored_bytes
from nbl_export.verify.speed.values import GraphCost
from nbl_export.workspace import Workspace

NOTHING = GraphCost(0, 0, 0, 0)
# What the ways are compared at beside the counted time of workloads. Greedy search for weights is that for a token
# after one other, which reads nothing else.
WEIGHTS, ONE_TOKEN = "weights", "decode=1@1"
PAPERS, OURS, REPAIRED, ALL = "NBL", "ours", "ours, repaired", "all"
# Sets that are tried for each whole layer that is left out, by their loss so far, as greedy search does for blocks.
TRIES = 8
RIDGE = 1e-6

# The loss of a cut on a text.
Measure = Callable[[LossMeter], Loss]
# Measured figures by name, which are kept from run to run.
Kept = Callable[[str, Callable[[], float]], float]


@dataclass(frozen=True)
class Cut:
    """So much of one way: what is cut, in words, what that saves, and its loss; ``kl`` that of the selection text.

    ``blocks`` are those that become linear or are dropped.
    """

    way: str
    what: str
    saved: GraphCost
    loss: Measure
    kl: float = math.inf
    blocks: tuple[Block, ...] = ()


class Ways:
    """The ways over one calibrated and exported folder ``out``, compared with the paper's method for each K of ``ks``;
    ours for each workload.
    """

    def __init__(
        self, out: Path, model: torch.nn.Module, ks: Sequence[int], workloads: Sequence[str], kept: Kept
    ) -> None:
        self.out, self.model, self.ks, self._kept = out, model, ks, kept
        self.most = max(ks) + 2
        self.compared_by = (WEIGHTS, *workloads)
        self.ws = Workspace.open(out)
        self.empty = api.select(out, api.SelectSettings(k=0, criterion="cca"))
        graph, self.graph = load_graph(self.ws.baseline), graph_cost(self.ws.baseline)
        self.linear = block_savings(graph, self.empty)
        self.without = block_savings(graph, self.empty, 0)
        self.stored, self.roofline = stored_bytes(graph), measure_roofline()
        self.text = load_text(self.ws.text)
        self._moments = load_moments(self.ws.moments)[0]
        self._fits: dict[Block, LinearLayer] = {}

    def gain(self, cut: Cut, by: str) -> float:
        """Parameters that are saved, or how many times as fast a workload is, as counted."""
        if by == WEIGHTS:
            return float(cut.saved.weight_macs)
        workload = [workload_of(by)]
        return Savings(self.graph, {0: cut.saved}, self.roofline, workload, self.stored).speedup([0])

    def scores(self) -> Scores:
        return from_json(Scores, read_json(self.ws.candidates, "candidates", ""), "candidates", "")

    def paper(self) -> Iterator[Cut]:
        candidates = [c for c in self.scores().candidates if part_of(c.layer) == ATTENTION]
        order = [c.layer for c in sorted(candidates, key=lambda c: c.cca)]
        for k in range(1, self.most + 1):
            yield self._linear(PAPERS, order[:k])

    def attention_drop(self) -> Iterator[Cut]:
        api.select(self.out, api.SelectSettings(k=1, criterion="drop"))
        candidates = [c for c in self.scores().candidates if part_of(c.layer) == ATTENTION]
        order = [c.layer for c in sorted(candidates, key=lambda c: c.drop or 0.0)]
        for k in range(1, self.most + 1):
            yield self._dropped("attention drop", order[:k])

    @property
    def by_name(self) -> dict[str, Callable[[], Iterator[Cut]]]:
        """The ways; that of ours over all blocks is one of ``ours``, too."""
        return {
            PAPERS: self.paper,
            "attention drop": self.attention_drop,
            "block drop": self.block_drop,
            "bypass": self.bypass,
            OURS: self.ours,
            ALL: lambda: self.ours(alone=False),
        }

    def ours(self, alone: bool = True) -> Iterator[Cut]:
        """Attention, MLPs and spans ``alone``, if asked for; then all for each thing to save.

        All is what a search finds that is to save as much as the paper's method with one of the ``ks``.
        """
        for part in (*PARTS, SPAN) if alone else ():
            # MLPs alone, which save nothing but weights, need twice as many, and spans have several each.
            order = Choosing.order

            def own(choosing: Choosing, candidates: Any, part: str = part, order: Any = order) -> Any:
                return order(choosing, [c for c in candidates if part_of(c.layer) == part])

            with patch.object(Choosing, "order", own):
                yield from self._searched(part, ONE_TOKEN, 2 * self.most)
        papers = list(self.paper())
        for by in self.compared_by:
            for k in self.ks:
                workload = ONE_TOKEN if by == WEIGHTS else by
                asked = self.gain(papers[k - 1], workload)
                # A few parts more than the paper has: in decode an MLP saves less than an attention.
                with patch.object(Choosing, "least_speedup", asked):
                    yield from self._searched(f"{ALL}, by {by}", workload, k + 4)

    def _searched(self, name: str, workload: str, most: int) -> Iterator[Cut]:
        """What is found for the ``workload``."""
        api.select(self.out, api.SelectSettings(k=most, workload=(workload,)))
        curve = self.scores().curve
        assert curve is not None
        for point in curve.points:
            yield replace(self._linear(name, point.layers), kl=point.kl)

    def block_drop(self) -> Iterator[Cut]:
        meter = cache(
            lambda: LossMeter(self.model, self.text.selection, self.text.selection_document, "normed")
        )
        chosen: list[Block] = []

        def kl(layers: Iterable[Block]) -> float:
            blocks = [b for i in sorted(layers) for b in (i, Mlp(int(i)))]  # type: ignore[arg-type]
            name = f"block drop|{' '.join(map(str, blocks))}"
            return self._kept(name, lambda: meter().measure(dict.fromkeys(blocks, DROPPED)).kl)

        bounds = {i: kl([i]) for i in attentions(self.empty.candidates)}
        while len(chosen) < self.most // 2:
            tried = {i: kl([*chosen, i]) for i in sorted(bounds, key=lambda i: bounds[i])[:TRIES]}
            bounds |= tried
            best = min(tried, key=lambda i: tried[i])
            chosen.append(best)
            del bounds[best]
            blocks = [b for i in chosen for b in (i, Mlp(int(i)))]  # type: ignore[arg-type]
            yield self._dropped("block drop", blocks)

    def bypass(self) -> Iterator[Cut]:
        runs = self._runs()
        maps = cache(lambda: self._fitted(runs))
        d = self.empty.hidden_size
        for number, (start, end) in enumerate(runs):
            blocks: list[Block] = [block for i in range(start, end) for block in (i, Mlp(i))]
            saved = less(total(self.without, blocks), GraphCost(d * d, 0, 4 * d * d, 0))

            def loss(meter: LossMeter, start: int = start, end: int = end, number: int = number) -> Loss:
                a, b = maps()[number]
                return meter.measure_within(bypassed(meter.model, start, end, a, b), start)

            yield Cut("bypass", f"{start}-{end - 1}", saved, loss)

    def _runs(self) -> list[tuple[int, int]]:
        """For each length, where the residual stream turns least: mean cosine of before and after."""
        count = self.empty.layer_count
        lengths = range(1, self.most // 2 + 1)
        similar = np.zeros((count, count + 1))
        for states in self._states(self.text.selection):
            unit = [torch.nn.functional.normalize(s, dim=-1) for s in states]
            for n in lengths:
                for i in range(count - n):  # the last state is after the final norm
                    similar[i, i + n] += float((unit[i] * unit[i + n]).sum(-1).mean())
        return [
            (start, start + n)
            for n in lengths
            for start in [max(range(count - n), key=lambda i: similar[i, i + n])]
        ]

    def _fitted(self, runs: Sequence[tuple[int, int]]) -> list[tuple[Any, Any]]:
        """A and b of the LMMSE from the residual stream before each run to what it adds, on the calibration text."""
        d = self.empty.hidden_size
        xx = np.zeros((len(runs), d, d))
        xy, x, y = np.zeros_like(xx), np.zeros((len(runs), d)), np.zeros((len(runs), d))
        tokens = 0
        for states in self._states(self.text.calibration):
            tokens += len(states[0])
            for n, (start, end) in enumerate(runs):
                before, after = (states[i].double().numpy() for i in (start, end))
                # What is added: the stream itself has values that a map in bfloat16 would lose.
                after -= before
                xx[n] += before.T @ before
                xy[n] += before.T @ after
                x[n] += before.sum(0)
                y[n] += after.sum(0)
        found = []
        for n in range(len(runs)):
            mx, my = x[n] / tokens, y[n] / tokens
            cxx, cxy = xx[n] / tokens - np.outer(mx, mx), xy[n] / tokens - np.outer(mx, my)
            a = np.linalg.solve(cxx + RIDGE * np.diag(np.diag(cxx)), cxy).T
            found.append((torch.from_numpy(a).float(), torch.from_numpy(my - a @ mx).float()))
        return found

    def _states(self, rows: Any) -> Iterator[list[torch.Tensor]]:
        for row in rows:
            with torch.inference_mode():
                ids = torch.from_numpy(np.asarray(row, np.int64))[None]
                output = self.model(
                    input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1
                )
            yield [state[0].float() for state in output.hidden_states]

    def repaired(self, cut: Cut, steps: int) -> Cut:
        """``cut`` with its linear blocks repaired together, which is done when its loss is asked for."""
        plan = cache(lambda: api.select(self.out, api.SelectSettings(layers=cut.blocks, repair=steps)))
        what = f"{cut.what}, {steps} steps"
        return replace(cut, way=REPAIRED, what=what, loss=lambda meter: loss_of_plan(meter, plan()))

    def _linear(self, way: str, layers: Sequence[Block]) -> Cut:
        return self._of(way, layers, self.linear, self._fit)

    def _dropped(self, way: str, layers: Sequence[Block]) -> Cut:
        return self._of(way, layers, self.without, lambda _block: DROPPED)

    def _of(
        self,
        way: str,
        layers: Sequence[Block],
        saved: Mapping[Block, GraphCost],
        fit: Callable[[Block], Replacement],
    ) -> Cut:
        named = tuple(sorted(layers))
        first = {parts_in(block)[0] for block in named}
        left = [part for part in all_parts(named) if part not in first]

        def loss(meter: LossMeter) -> Loss:
            return meter.measure(by_part({block: fit(block) for block in named}))

        gone = sum_of(total(saved, first), total(self.without, left))
        return Cut(way, " ".join(map(str, named)), gone, loss, blocks=named)

    def _fit(self, block: Block) -> LinearLayer:
        if block not in self._fits:
            fit = fit_lmmse(self._moments.layers[block], "normed", DEFAULT_RIDGE)
            self._fits[block] = as_layer(fit)
        return self._fits[block]


def sum_of(a: GraphCost, b: GraphCost) -> GraphCost:
    """What ``a`` and ``b`` are together."""
    return less(a, less(NOTHING, b))


def total(saved: Mapping[Block, GraphCost], blocks: Iterable[Block]) -> GraphCost:
    """What ``blocks`` save together."""
    left = NOTHING
    for block in blocks:
        left = less(left, saved[block])
    return less(NOTHING, left)


@contextmanager
def bypassed(
    model: torch.nn.Module, start: int, end: int, a: torch.Tensor, b: torch.Tensor
) -> Iterator[None]:
    """The model whose layers from ``start`` to before ``end`` are one affine map of the residual stream."""
    _, layers = block_stack(model)
    before: list[torch.Tensor] = []

    def read(_layer: Any, args: Any, kwargs: Any) -> None:
        before.append(args[0] if args else kwargs["hidden_states"])

    def write(_layer: Any, _args: Any, output: Any) -> Any:
        # Rows may go through a layer one after the other before the next layer has its turn.
        x = before.pop(0)
        mapped = (x.float() + torch.nn.functional.linear(x.float(), a, b)).to(x)
        return (mapped, *output[1:]) if isinstance(output, tuple) else mapped

    hooks = [
        list(layers.children())[start].register_forward_pre_hook(read, with_kwargs=True),
        list(layers.children())[end - 1].register_forward_hook(write),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
