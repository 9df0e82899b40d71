"""Where the time of two graphs goes, node by node, by ONNX Runtime's own profiler: why one is faster than it could be.

The ceiling knows multiplications and bytes. What a graph saves beyond them is the time of nodes that it no longer has:
transposes, masks, softmax, copies of the cache, and starting each of them. Nodes that both graphs have do the same work
in both. If what was saved is not seen in the nodes that are gone, then it was not the graph that was measured but the
machine, and the cell is suspect.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from nbl_export.runtime.ort import OrtModel
from nbl_export.runtime.session import CPU
from nbl_export.verify.speed.candidates import Candidate, Prompt, RunGraph
from nbl_export.verify.speed.values import CellResult, Explanation, Result

PROFILING = "Profiling above ceiling"  # cells above their ceiling, as a progress bar has room for it
_SHOWN = 4
# So many passes of a graph, at least and at most: between them as many as take this time.
_LEAST_PASSES, _MOST_PASSES, _PASSES_MS = 3, 15, 5000.0
# Of the excess, what need not be seen in the nodes that are gone; and how far a profile of few passes is off.
_SUSPECT, _PROFILE_ERROR = 0.5, 0.1
_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class NodeTimes:
    """Milliseconds of each node of one pass, by the node's name, and its operator."""

    ms: Mapping[str, float]
    ops: Mapping[str, str]


@dataclass(frozen=True)
class GraphPair:
    """A graph and the one that it was made from, for a profile; ``base`` is that one's name in the race."""

    base: str
    graphs: tuple[Path, Path]


def graph_pairs(candidates: Sequence[Candidate]) -> dict[str, GraphPair]:
    """Each candidate with a base, by name, where both are graphs."""
    graphs = {c.name: c.graph for c in candidates}
    return {
        c.name: GraphPair(c.base, (base, c.graph))
        for c in candidates
        if c.base is not None and c.graph is not None and (base := graphs.get(c.base)) is not None
    }


def explained_cell(
    cell: CellResult, pairs: Mapping[str, GraphPair], run: RunGraph, provider: str = CPU
) -> CellResult:
    """``cell`` with the reason of each speedup in it that is surely above its ceiling, by a profile of both graphs.

    ``run`` makes what runs a cell in a session. To be called when the race is over: what raced has taken the memory
    that a profile needs.
    """

    def explanation(result: Result) -> Explanation | None:
        pair, over, limit = pairs.get(result.name), result.over_base, result.ceiling
        base = cell.of(pair.base) if pair else None
        if not (pair and base and over and limit):
            return None
        made = partial(_made, run, cell)
        return explain(pair.graphs, cell.phase, made, base.timing.median_ms, over.least, limit, provider)

    return replace(cell, results=tuple(replace(r, explanation=explanation(r)) for r in cell.results))


def _made(run: RunGraph, cell: CellResult, model: OrtModel) -> Prompt:
    return run(model, cell.context, cell.batch)


def explain(
    graphs: tuple[Path, Path],
    phase: str,
    made: Callable[[OrtModel], Prompt],
    base_ms: float,
    speedup: float,
    ceiling: float,
    provider: str = CPU,
) -> Explanation | None:
    """Profile base and linearized graph in one cell and compare them node by node.

    ``speedup`` is what its 95 % interval is sure of, since noise has no reason; None where that is not above its
    ``ceiling``. ``base_ms`` is what a pass of the base graph took in the race; ``made`` gives what runs the cell.
    Prefills are run in turn, decode steps in a row and then again, as the race has them: a graph that follows itself
    finds a part of its weights in the caches.
    """
    if speedup <= ceiling:
        return None
    runs = max(_LEAST_PASSES, min(_MOST_PASSES, round(_PASSES_MS / base_ms)))
    with tempfile.TemporaryDirectory(prefix="nbl-profile.") as folder:
        models = [
            OrtModel(path, provider=provider, rounded=False, profile=Path(folder) / name)
            for path, name in zip(graphs, "ab", strict=True)
        ]
        prompts = [made(model) for model in models]
        turns = 2 if phase == "decode" else 0
        for _ in range(1 if turns else runs + 1):  # one to warm up, or to fill the cache
            for prompt in prompts:
                prompt.prefill()
        for _ in range(turns):
            for prompt in prompts:
                for _ in range(runs):
                    prompt.step()
        passes = runs * max(1, turns)
        a, b = (_node_times(Path(model.session.end_profiling()), passes) for model in models)
    saved, at_ceiling = (base_ms - base_ms / times for times in (speedup, ceiling))
    return compared(a, b, base_ms, saved, saved - at_ceiling)


def compared(a: NodeTimes, b: NodeTimes, base_ms: float, saved_ms: float, excess_ms: float) -> Explanation:
    """What the graph ``b`` saves of ``a``, by operator, on the scale of a race in which ``a`` took ``base_ms``."""
    # Profiling costs time itself, and another minute of the machine may be another speed.
    scale = base_ms / sum(a.ms.values())
    saved: Counter[str] = Counter()
    for times, sign in ((a, 1), (b, -1)):
        for name, ms in times.ms.items():
            saved[times.ops[name]] += sign * ms  # type: ignore[assignment]
    shared = a.ms.keys() & b.ms.keys()
    gone = sum(
        sum(ms for name, ms in x.ms.items() if name not in shared) * sign for x, sign in ((a, 1), (b, -1))
    )
    most = {op: scale * ms for op, ms in saved.most_common(_SHOWN) if ms > 0}
    suspect = saved_ms - scale * gone > max(_SUSPECT * excess_ms, _PROFILE_ERROR * saved_ms)
    return Explanation(len(a.ms), len(b.ms), most, saved_ms, excess_ms, scale * gone, suspect)


def _node_times(profile: Path, runs: int) -> NodeTimes:
    """Medians over the last ``runs`` passes."""
    import numpy as np

    found: dict[str, list[float]] = {}
    ops: dict[str, str] = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        name, args = str(event.get("name", "")), event.get("args")
        if event.get("cat") == "Node" and name.endswith(_SUFFIX) and isinstance(args, dict):
            node = name.removesuffix(_SUFFIX)
            found.setdefault(node, []).append(float(str(event["dur"])) / 1e3)
            ops[node] = str(args.get("op_name"))
    return NodeTimes({n: float(np.median(ms[-runs:])) for n, ms in found.items()}, ops)
