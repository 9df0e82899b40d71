"""Reports and graphs as facts by name, which are compared one by one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from nbl_export.checks import Check
from nbl_export.evaluate.recovery import Estimate
from nbl_export.evaluate.results import Compared
from nbl_export.graph.summary import GraphFacts, GraphSummary
from nbl_export.records import to_json
from nbl_export.report.diff.values import Fact, Figure
from nbl_export.report.drawing import listed
from nbl_export.report.evaluation import Evaluation
from nbl_export.report.header import Header
from nbl_export.report.schema import Report
from nbl_export.report.speed import milliseconds
from nbl_export.verify.loss.figures import Likeness, MethodLoss
from nbl_export.verify.parity.figures import DecoderParity, EncoderParity, Parity
from nbl_export.verify.speed.values import Ratio, Speed

# Of fewer documents there is no standard error.
_FEWEST = 2
# How the measures of an encoder's loss begin that are distances; the others are likenesses.
_DISTANCES = ("KL", "change")
# The files that held-out text or images come from, and how near two perplexities of one text are.
_HELD_OUT = ("nbl/text.safetensors", "nbl/images.safetensors")
_SAME_TEXT = 1e-3


def model_facts(judged: Header | None) -> dict[str, Fact]:
    """The model, of a report its linear layers, and everything that was asked for."""
    if judged is None:
        return {}
    asked = judged.settings
    return {
        "model": _said(judged.model.source),
        "model's fingerprint": _said(judged.model.fingerprint[:16]),
        **(_selection_facts(judged) if isinstance(judged, Report) else {}),
        **_asked(asked if isinstance(asked, Mapping) else to_json(asked)),
    }


def _selection_facts(report: Report) -> dict[str, Fact]:
    chosen = report.selection
    count = f"{len(chosen.layers)} of {report.model.layers}"
    return {
        "hidden size": _counted(report.model.hidden_size),
        "linear layers": Fact(
            Figure(f"{count}: {listed(chosen.layers)}" if chosen.layers else count),
            headline=True,
            members=tuple(map(str, chosen.layers)),
        ),
        "criterion": _said(chosen.criterion),
        "calibration tokens": _counted(chosen.calibration_tokens),
    }


def _asked(settings: Mapping[str, Any], before: str = "") -> dict[str, Fact]:
    """Settings of stages, those within others too; one that was not given is not there."""
    found: dict[str, Fact] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _asked(value, f"{before}{name}: ")
        elif value is not None:
            many = isinstance(value, (list, tuple))
            text = ", ".join(map(str, value)) if many else str(value)
            found[f"{before}{name}"] = _said({"True": "yes", "False": "no"}.get(text, text))
    return found


def summary_facts(graph: GraphSummary | None, headline: bool = True) -> dict[str, Fact]:
    """The counts of a graph, and its nodes by operator."""
    if graph is None:
        return {}
    found = {
        "size on disk": Fact(Figure(graph.file_bytes), "lower", "bytes", headline),
        "parameters": _counted(graph.parameters),
        "KV pairs (layers with a cache)": _counted(graph.kv_pairs),
        "inputs": _counted(graph.inputs),
        "outputs": _counted(graph.outputs),
        "initializers": _counted(graph.initializers),
        "nodes": _counted(graph.nodes),
        **{f"nodes: {op}": _counted(count) for op, count in sorted(graph.ops.items())},
    }
    if graph.kv_bytes_per_token:
        figure = Figure(graph.kv_bytes_per_token)
        found["KV cache, bytes per token"] = Fact(figure, "lower", "", headline)
    return found


def file_facts(graph: GraphFacts | None, headline: bool) -> dict[str, Fact]:
    """What a graph file says beside its counts."""
    if graph is None:
        return {}
    linear = listed(graph.linear) or "none"
    found = {
        "linear layers in the graph": Fact(
            Figure(linear), headline=headline, members=tuple(map(str, graph.linear))
        ),
        "KV pairs are of layers": _said(listed(graph.kv_layers) or "none"),
        "KV cache": _said(graph.cache),
        **{f"opset of {domain}": _counted(version) for domain, version in graph.opsets.items()},
    }
    for dtype, stored in graph.initializers.items():
        found[f"{dtype} initializers"] = _counted(stored.count)
        found[f"{dtype} initializers, bytes"] = _counted(stored.bytes)
    for name, values in (("inputs", graph.inputs), ("outputs", graph.outputs)):
        found[f"{name} beside the KV cache"] = Fact(Figure(len(values)), members=values)
    return found


def loss_facts(loss: MethodLoss | Likeness | None) -> dict[str, Fact]:
    """What linearizing costs, with standard errors over documents."""
    if loss is None:
        return {}
    if isinstance(loss, Likeness):
        return {
            m.what: Fact(
                _measured(m.value, m.se, loss.documents),
                "lower" if m.what.startswith(_DISTANCES) else "higher",
                "loss",
                headline=not number,
            )
            for number, m in enumerate(loss.measures)
        }
    ratio = _measured(loss.perplexity_ratio, loss.perplexity_ratio_se, loss.documents)
    return {
        "perplexity ratio": Fact(ratio, "lower", "loss", True),
        "KL, nats per token": Fact(_measured(loss.kl, loss.kl_se, loss.documents), "lower", "loss", True),
        "perplexity, original": Fact(Figure(loss.perplexity_original), unit="loss"),
        "perplexity, linearized": Fact(Figure(loss.perplexity_linearized), unit="loss"),
        "held-out tokens": _counted(loss.tokens),
    }


def same_text(a: Report, b: Report) -> bool:
    """Whether both losses are of the same held-out data: by its digest, or by what the original makes of it."""
    if any(a.hashes.get(name, "") == b.hashes.get(name) for name in _HELD_OUT):
        return True
    one, other = a.method_loss, b.method_loss
    if not (isinstance(one, MethodLoss) and isinstance(other, MethodLoss)):
        return False
    same = (one.documents, one.tokens) == (other.documents, other.tokens)
    return same and math.isclose(one.perplexity_original, other.perplexity_original, rel_tol=_SAME_TEXT)


def parity_facts(parity: DecoderParity | EncoderParity | Parity | None) -> dict[str, Fact]:
    """The largest differences to PyTorch, which have gates of their own: less is not better."""
    if parity is None:
        return {}
    if isinstance(parity, EncoderParity):
        return {f"max relative difference of {o.output}": _error(o.max_rel) for o in parity.outputs}
    steps = parity.steps
    if not steps:  # of a report that somebody else may have written
        return {"steps": _counted(0)}
    return {
        "max |Δlogit|": _error(_worst(s.max_abs for s in steps)),
        "mean |Δlogit|": _error(parity.mean_abs),
        "max KL": _error(_worst(s.max_kl for s in steps)),
        "KV relative error": _error(_worst(s.kv_max_rel for s in steps)),
        "steps": _counted(len(steps)),
    }


def engine_facts(report: Report | None) -> dict[str, Fact]:
    """What was built, and the parity of both engines."""
    found: dict[str, Fact] = {}
    for m in (report.engines if report else None) or ():
        found[f"{m.role} engine: library"] = _said(f"{m.library} {m.library_version}")
        found[f"{m.role} engine: size"] = Fact(Figure(m.size), "lower", "bytes")
    parity = report.engine_parity if report else None
    both = {"linearized engine": parity.linearized, "base engine": parity.base} if parity else {}
    for name, own in both.items():
        found |= {f"{name}: {what}": fact for what, fact in parity_facts(own).items()}
    return found


def speed_facts(speed: Speed | None, headline: bool = False) -> dict[str, Fact]:
    """Every speedup, over its own base or of the linearized candidate over another, with the time beside it.

    ``headline``: the linearized candidate's of each phase at its longest context is one.
    """
    found: dict[str, Fact] = {}
    if speed is None:
        return found
    own = speed.speedups()
    longest = {cell.phase: cell for cell, _, _ in sorted(own, key=lambda f: (f[0].context, -f[0].batch))}
    for cell in speed.cells:
        for result in cell.results:
            ratio, linear = result.over_base, result.name == speed.linearized
            if ratio is not None:
                name = f"{cell.name}: speedup" if linear else f"{cell.name}: {result.name}"
                first = headline and linear and longest.get(cell.phase) is cell
                found[name] = _speedup(ratio, f"{milliseconds(result.timing.median_ms)} ms", first)
            if result.linearized_over is not None and not linear and result.name != speed.base:
                found[f"{cell.name}: over {result.name}"] = _speedup(result.linearized_over)
    return found


def _speedup(ratio: Ratio, detail: str = "", headline: bool = False) -> Fact:
    figure = Figure(ratio.value, least=ratio.least, most=ratio.most)
    return Fact(figure, "higher", "times", headline, detail)


def task_facts(evaluation: Evaluation | None) -> dict[str, Fact]:
    """Scores of the linearized graph and their recovery, by task and by context length; then their means."""
    if evaluation is None:
        return {}
    found: dict[str, Fact] = {}
    for task in evaluation.tasks:
        if (own := task.metrics.get(task.scored or "")) is not None:
            found |= _scores(f"{task.name}, {task.scored}", own, task.documents)
        for name, both in task.figures.items():
            if name not in task.metrics:  # perplexities, without an error
                found[f"{task.name}, {name}"] = Fact(Figure(both.linearized), unit="loss")
    for one in evaluation.retrieval:
        for way, compared in (("choice", one.choice), ("exact", one.exact)):
            found |= _scores(f"retrieval, {one.context:,} tokens, {way}", compared, one.questions)
    for name, mean in (("tasks", evaluation.mean.tasks), ("retrieval", evaluation.mean.retrieval)):
        if mean and mean.recovery:
            found[f"mean recovery of {name}"] = _score(mean.recovery, _FEWEST, headline=True)
    return found


def _scores(name: str, compared: Compared, documents: int) -> dict[str, Fact]:
    found = {f"{name}: base": _score(compared.base, documents)}
    found[f"{name}: linearized"] = _score(compared.linearized, documents)
    if compared.recovery:
        found[f"{name}: recovery"] = _score(compared.recovery, documents)
    return found


def _score(estimate: Estimate, documents: int, headline: bool = False) -> Fact:
    return Fact(_measured(estimate.value, estimate.se, documents), "higher", "percent", headline)


def check_facts(*judged: Header | None) -> dict[str, Fact]:
    """The verdicts of reports, and those of their checks."""
    return {name: Fact(Figure(check.status), "passed") for name, check in named_checks(*judged).items()}


def named_checks(*judged: Header | None) -> dict[str, Check]:
    """The checks of reports by name; a name that is there twice has a number."""
    found: dict[str, Check] = {}
    for report in judged:
        for check in report.checks if report else ():
            number = 1
            while (name := check.name if number == 1 else f"{check.name} ({number})") in found:
                number += 1
            found[name] = check
    return found


def environment_facts(judged: Header | None) -> dict[str, Fact]:
    """The machine, the versions of packages, and that of nbl-export."""
    if judged is None:
        return {}
    environment = judged.environment
    return {
        "processor": _said(environment.processor),
        "cores": _said(str(environment.cores)),
        "memory, GiB": _said(f"{environment.memory_gib:g}"),
        "system": _said(environment.system),
        "Python": _said(environment.python),
        "nbl-export": _said(judged.tool_version),
        **{name: _said(version) for name, version in environment.packages.items()},
    }


def _said(text: str) -> Fact:
    return Fact(Figure(text))


def _counted(value: int) -> Fact:
    return Fact(Figure(value))


def _error(value: float) -> Fact:
    return Fact(Figure(value), unit="error")


def _worst(values: Iterable[float]) -> float:
    """The largest; what is no number is worse than any."""
    return max(values, key=lambda v: (v != v, v))


def _measured(value: float, se: float, documents: int) -> Figure:
    """Of one document no error is known; 0 would look certain."""
    return Figure(value, se if documents >= _FEWEST else math.nan)
