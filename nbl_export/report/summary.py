"""Say a report in a few words: its verdict, its headline figures, and how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import NamedTuple

from nbl_export.blocks import Block, Span, all_parts, attentions, layer_of
from nbl_export.models.source import ModelIdentity
from nbl_export.report.drawing import figure, listed, number
from nbl_export.report.schema import Environment, Report
from nbl_export.report.selection import fit_in_words
from nbl_export.verify.parity.figures import DecoderParity, EncoderParity, Likeness, MethodLoss
from nbl_export.verify.speed.values import Result, Speed


class Headline(NamedTuple):
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


def replaced_line(report: Report) -> str:
    """How many were replaced, and what stands in their place: one map each, one for several, or nothing."""
    chosen = report.selection
    maps = len(chosen.layers)
    how = "replaced by one affine map each"
    if any(isinstance(block, Span) for block in chosen.layers):
        how = f"replaced by {maps} affine map{'s' * (maps > 1)} together"
    return f"{replaced(report)} {'left out of the graph' if chosen.fit == 'drop' else how}"


def verdict_line(report: Report) -> str:
    """What PASS or FAIL stands for: the checks that decide it, what linearizing costs, and what was skipped."""
    names: dict[str, list[str]] = {}
    for check in report.checks:
        # That the figures of speed can be believed is no gate; a loss that is shown all the same was kept.
        if (check.name, check.status) != ("speed", "passed"):
            names.setdefault(check.status, []).append(check.name)
    decided = names.get("failed") or names.get("passed") or ["nothing was checked"]
    loss, kept = report.method_loss, report.kept.get("method_loss")
    cost = loss_in_words(loss) + (f", measured {kept.created}" if kept and loss else "")
    if isinstance(loss, MethodLoss):
        bound = report.asked("method_loss").get("bound") or {}
        said = (("max_perplexity_ratio", "perplexity × {}"), ("max_kl", "KL {}"))
        limits = [words.format(number(bound[n], "g")) for n, words in said if bound.get(n) is not None]
        cost += f", at most {' and '.join(limits)} asked" if limits else ", no bound asked"
    skipped = [n for n in names.get("skipped", ()) if not (n == "method loss" and loss)]
    return "; ".join(
        [f"({', '.join(decided)})", cost, *([f"skipped: {', '.join(skipped)}"] if skipped else [])]
    )


def loss_in_words(loss: MethodLoss | Likeness | None) -> str:
    """What linearizing costs, in a line."""
    if loss is None:
        return "its loss was not measured"
    if isinstance(loss, Likeness):
        shown = ", ".join(f"{m.what} {number(m.value, '.4f')}" for m in loss.measures)
        return f"{shown} on held-out {loss.unit}"
    ratio, kl = number(loss.perplexity_ratio, ".3f"), number(loss.kl, ".2g")
    return f"perplexity × {ratio}, KL {kl} on held-out text"


def headlines(report: Report) -> list[Headline]:
    """What was replaced, what it cost and what it gains; only what was measured."""
    return [
        *_size(report),
        *_loss(report.method_loss),
        *_speedups(report.speed, "on the CPU", ""),
        *_speedups(report.engine_speed, "on the GPU", ", engine against engine"),
        *_parity(report.parity),
    ]


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


def _loss(loss: MethodLoss | Likeness | None) -> Iterator[Headline]:
    found: list[tuple[str, str, str, str]] = []
    if isinstance(loss, Likeness):
        held_out = f"held-out {loss.unit}"
        found = [(m.what, number(m.value, ".4f"), number(m.se, ".4f"), held_out) for m in loss.measures[:1]]
    elif loss:
        ratio, se = number(loss.perplexity_ratio, ".3f"), number(loss.perplexity_ratio_se, ".3f")
        found = [("Perplexity", f"× {ratio}", se, f"{loss.tokens:,} held-out tokens")]
    for name, value, error, on in found:
        yield Headline(name, value, (f"± {error}, " if loss and loss.documents > 1 else "") + on)


def _speedups(speed: Speed | None, where: str, against: str) -> Iterator[Headline]:
    """Of each phase at the longest context."""
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


def ceiling_in_words(result: Result) -> str:
    """The ceiling of a speedup and, if that is above it, why; empty if there is none."""
    over, limit = result.over_base, result.ceiling
    if limit is None or over is None:
        return ""
    shown = f"{number(limit, '.2f')}×"
    if not over.value > limit:
        return f"ceiling {shown}"
    if over.least > limit:
        return f"above its ceiling of {shown}, which counts multiplications and bytes only"
    return f"ceiling {shown}, exceeded within the noise"


def _parity(parity: DecoderParity | EncoderParity | None) -> Iterator[Headline]:
    if parity is None:
        return
    if isinstance(parity, EncoderParity):
        found, of = [o.max_rel for o in parity.outputs], "max relative difference to PyTorch"
    else:
        found, of = [s.max_abs for s in parity.steps], "max |Δlogit| to PyTorch"
    # What is no number is worse than any.
    yield Headline("Parity", figure(max(found, key=lambda v: (v != v, v))), of)


def measured_on(environment: Environment) -> tuple[str, str]:
    """The machine, and the packages, each in a line."""
    machine = (
        f"{environment.processor}, {environment.cores} cores, {environment.memory_gib} GiB, "
        f"{environment.system}, Python {environment.python}"
    )
    return machine, ", ".join(f"{name} {version}" for name, version in environment.packages.items())


def making(report: Report) -> list[tuple[str, str]]:
    """How the report was made, as pairs of a word and what it stands for."""
    chosen, graph, (machine, packages) = report.selection, report.graph, measured_on(report.environment)
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
        ("Measured on", machine),
        ("Packages", packages),
        ("Model fingerprint", report.model.fingerprint),
    ]
