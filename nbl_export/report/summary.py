"""A report in a few words: its verdict, its headline figures, and how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath

from nbl_export.blocks import Block, Span, all_parts, attentions, layer_of
from nbl_export.models.source import ModelIdentity
from nbl_export.report.drawing import figure, listed, number
from nbl_export.report.environment import Environment
from nbl_export.report.schema import Report
from nbl_export.report.selection import fit_in_words
from nbl_export.report.speed import ceiling_in_words
from nbl_export.verify.loss.figures import Likeness, MethodLoss
from nbl_export.verify.parity.figures import EncoderParity
from nbl_export.verify.speed.values import Speed


@dataclass(frozen=True)
class Headline:
    """One figure that a reader looks for first: its name, its value, and what it depends on."""

    name: str
    value: str
    detail: str


def model_name(model: ModelIdentity) -> str:
    """The last part of the model's path or Hub id."""
    return PurePath(model.source).name or model.source


def replaced(report: Report) -> str:
    """How many of the model's attention layers and MLPs were replaced: 2 of 5 attention layers and 1 of 5 MLPs."""
    layers = all_parts(report.selection.layers)
    own = len(attentions(layers))
    parts = [f"{own} of {report.model.layers} attention layers"] if own or not layers else []
    if mlps := len(layers) - own:
        parts.append(f"{mlps} of {report.model.layers} MLPs")
    return " and ".join(parts)


def replacement(report: Report) -> str:
    """What stands in the place of those: one map each, one for several where there are spans, or nothing."""
    if report.selection.fit == "drop":
        return "left out of the graph"
    if any(isinstance(block, Span) for block in report.selection.layers):
        maps = len(report.selection.layers)
        return f"replaced by {maps} affine map{'s' * (maps > 1)} together"
    return "replaced by one affine map each"


def replaced_line(report: Report) -> str:
    """Both: how many were replaced, and by what."""
    return f"{replaced(report)} {replacement(report)}"


def verdict_line(report: Report) -> str:
    """What PASS or FAIL stands for: the checks that decide it, what linearizing costs, and what was skipped."""
    names: dict[str, list[str]] = {}
    for check in report.checks:
        if (check.name, check.status) == ("speed", "passed"):
            continue  # that its figures can be believed is no gate
        names.setdefault(check.status, []).append(check.name)
    decided = names.get("failed") or names.get("passed") or ["nothing was checked"]
    parts = [f"({', '.join(decided)})", _cost(report)]
    # What is shown all the same was kept from an earlier time, which is said beside it.
    if skipped := [
        name for name in names.get("skipped", ()) if not (name == "method loss" and report.method_loss)
    ]:
        parts.append(f"skipped: {', '.join(skipped)}")
    return "; ".join(parts)


def _cost(report: Report) -> str:
    loss, kept = report.method_loss, report.kept.get("method_loss")
    when = f", measured {kept.created}" if kept and loss else ""
    bounds = f", {_bounds(report)}" if isinstance(loss, MethodLoss) else ""
    return f"{loss_in_words(loss)}{when}{bounds}"


def loss_in_words(loss: MethodLoss | Likeness | None) -> str:
    """What linearizing costs, in a line."""
    if loss is None:
        return "its loss was not measured"
    if isinstance(loss, Likeness):
        shown = ", ".join(f"{m.what} {number(m.value, '.4f')}" for m in loss.measures)
        return f"{shown} on held-out {loss.unit}"
    ratio, kl = number(loss.perplexity_ratio, ".3f"), number(loss.kl, ".2g")
    return f"perplexity × {ratio}, KL {kl} on held-out text"


def _bounds(report: Report) -> str:
    asked = report.asked("method_loss").get("bound")
    asked = asked if isinstance(asked, Mapping) else {}
    said = (("max_perplexity_ratio", "perplexity × {}"), ("max_kl", "KL {}"))
    limits = [words.format(number(asked[name], "g")) for name, words in said if asked.get(name) is not None]
    return f"at most {' and '.join(limits)} asked" if limits else "no bound asked"


def headlines(report: Report) -> list[Headline]:
    """What was replaced, what it cost and what it gains; only what was measured."""
    return [*_size(report), *_loss(report), *_gain(report), *_parity(report)]


def _size(report: Report) -> Iterator[Headline]:
    layers, every = all_parts(report.selection.layers), report.model.layers
    own, gone = attentions(layers), "left out" if report.selection.fit == "drop" else "replaced"
    if own or not layers:
        detail = numbered(own) if own else "nothing was replaced"
        yield Headline(f"Attention layers {gone}", f"{len(own)} of {every}", detail)
    if mlps := [layer_of(block) for block in layers if block not in own]:
        yield Headline(f"MLPs {gone}", f"{len(mlps)} of {every}", numbered(mlps))
    if spans := [block for block in report.selection.layers if isinstance(block, Span)]:
        yield Headline("Spans, each by one map", str(len(spans)), listed(spans).replace("span", "layers", 1))
    before, after = report.graph.before, report.graph.after
    if before.kv_pairs:
        a, b = before.kv_bytes_per_token, after.kv_bytes_per_token
        yield Headline("KV cache", f"{(b - a) / a:+.1%}" if a else "", f"{a:,} → {b:,} bytes per token")


def numbered(blocks: Sequence[Block]) -> str:
    """Which: layer 2; layers 0, 3-5; layer 2; MLP 1."""
    own = len(attentions(blocks))
    return (f"layer{'s' * (own > 1)} " if own else "") + listed(blocks)


def _loss(report: Report) -> Iterator[Headline]:
    loss = report.method_loss
    if not loss:
        return
    if isinstance(loss, Likeness):
        for m in loss.measures[:1]:
            error = f"± {number(m.se, '.4f')}, " if loss.documents > 1 else ""
            yield Headline(m.what, number(m.value, ".4f"), f"{error}held-out {loss.unit}")
        return
    error = f"± {number(loss.perplexity_ratio_se, '.3f')}, " if loss.documents > 1 else ""
    yield Headline(
        "Perplexity",
        f"× {number(loss.perplexity_ratio, '.3f')}",
        f"{error}{loss.tokens:,} held-out tokens",
    )


def _gain(report: Report) -> Iterator[Headline]:
    """The speedup of each phase at the longest context; on the GPU too."""
    yield from _speedups(report.speed, "on the CPU", "")
    yield from _speedups(report.engine_speed, "on the GPU", ", engine against engine")


def _speedups(speed: Speed | None, where: str, against: str) -> Iterator[Headline]:
    found = speed.speedups() if speed else []
    for phase in dict.fromkeys(cell.phase for cell, _, _ in found):
        cell, result, over = max((f for f in found if f[0].phase == phase), key=lambda f: f[0].context)
        noise = "" if over.resolved else ", not resolved"
        ceiling = f"; {known}" if (known := ceiling_in_words(result)) else ""
        yield Headline(
            f"{phase.capitalize()} {where}",
            f"{number(over.value, '.2f')}×",
            f"at {cell.context:,} tokens{against}{noise}{ceiling}",
        )


def _parity(report: Report) -> Iterator[Headline]:
    if not report.parity:
        return
    if isinstance(report.parity, EncoderParity):
        found, of = [o.max_rel for o in report.parity.outputs], "max relative difference to PyTorch"
    else:
        found, of = [s.max_abs for s in report.parity.steps], "max |Δlogit| to PyTorch"
    # What is no number is worse than any.
    worst = max(found, key=lambda v: (v != v, v))
    yield Headline("Parity", figure(worst), of)


def measured_on(environment: Environment) -> str:
    """The machine and the packages in one line."""
    return f"{_machine(environment)}; {_packages(environment)}."


def _machine(environment: Environment) -> str:
    return (
        f"{environment.processor}, {environment.cores} cores, {environment.memory_gib} GiB, "
        f"{environment.system}, Python {environment.python}"
    )


def _packages(environment: Environment) -> str:
    return ", ".join(f"{name} {version}" for name, version in environment.packages.items())


def making(report: Report) -> list[tuple[str, str]]:
    """How the report was made, as pairs of a word and what it stands for."""
    chosen, graph, environment = report.selection, report.graph, report.environment
    cache = graph.task or f"{graph.kv_cache} KV cache"
    dtype = chosen.calibration_dtype
    seconds = (f"{name} {spent:.1f}" for name, spent in report.stage_seconds.items())
    return [
        ("Made", f"{report.created} with nbl-export {report.tool_version}"),
        (
            "Calibrated on",
            f"{chosen.calibration_tokens:,} tokens of {', '.join(chosen.sources)} (seed {chosen.seed}"
            f"{f', read in {dtype}' if dtype else ''})",
        ),
        ("Layers chosen by", chosen.criterion),
        ("W and b are", fit_in_words(chosen)),
        ("Graphs", f"{graph.precision}, {cache}, opset {graph.opset}"),
        ("Stages, seconds", ", ".join(seconds)),
        ("Measured on", _machine(environment)),
        ("Packages", _packages(environment)),
        ("Model fingerprint", report.model.fingerprint),
    ]
