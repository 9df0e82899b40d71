"""Say a report in a few words: its verdict, its headline figures, and how it was made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import NamedTuple

from nbl_export.blocks import Block, Span, all_parts, attentions, layer_of
from nbl_export.models.source import ModelIdentity
from nbl_export.report.drawing import figure, listed, number, worst
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
    own, every = len(attentions(layers)), report.model.layers
    counts = {"attention layers": own, "MLPs": len(layers) - own}
    shown = {what: n for what, n in counts.items() if n} or ({} if layers else {"attention layers": 0})
    return " and ".join(f"{n} of {every} {what}" for what, n in shown.items())


def replaced_line(report: Report) -> str:
    """How many were replaced, and what stands in their place: one map each, one for several, or nothing."""
    chosen, maps = report.selection, len(report.selection.layers)
    together = any(isinstance(block, Span) for block in chosen.layers)
    how = f"{maps} affine map{'s' * (maps > 1)} together" if together else "one affine map each"
    return f"{replaced(report)} {'left out of the graph' if chosen.fit == 'drop' else f'replaced by {how}'}"


def verdict_line(report: Report) -> str:
    """What PASS or FAIL stands for: the checks that decide it, what linearizing costs, and what was skipped."""
    loss, kept = report.method_loss, report.kept.get("method_loss")
    # That the figures of speed can be believed is no gate; a loss that is shown all the same was kept.
    judged = [c for c in report.checks if (c.name, c.status) != ("speed", "passed")]
    failed, passed, skipped = (
        [c.name for c in judged if c.status == status] for status in ("failed", "passed", "skipped")
    )
    cost = loss_in_words(loss) + (f", measured {kept.created}" if kept and loss else "")
    if isinstance(loss, MethodLoss):
        bound = report.asked("method_loss").get("bound") or {}
        bounds = (("perplexity ×", bound.get("max_perplexity_ratio")), ("KL", bound.get("max_kl")))
        limits = [f"{what} {number(limit, 'g')}" for what, limit in bounds if limit is not None]
        cost += f", at most {' and '.join(limits)} asked" if limits else ", no bound asked"
    left_out = ", ".join(n for n in skipped if not (n == "method loss" and loss))
    said = [f"({', '.join(failed or passed or ['nothing was checked'])})", cost]
    return "; ".join([*said, *([f"skipped: {left_out}"] if left_out else [])])


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
        *(_loss(report.method_loss) if report.method_loss else ()),
        *(_speedups(report.speed, "on the CPU", "") if report.speed else ()),
        *(
            _speedups(engines, "on the GPU", ", engine against engine")
            if (engines := report.engine_speed)
            else ()
        ),
        *([_parity(report.parity)] if report.parity else ()),
    ]


def _size(report: Report) -> list[Headline]:
    layers, every = report.selection.layers, report.model.layers
    parts, gone = all_parts(layers), "left out" if report.selection.fit == "drop" else "replaced"
    own, spans = attentions(parts), [block for block in layers if isinstance(block, Span)]
    mlps = [layer_of(block) for block in parts if block not in own]
    before, after = report.graph.before.kv_bytes_per_token, report.graph.after.kv_bytes_per_token
    change = f"{(after - before) / before:+.1%}" if before else ""
    detail = numbered(own) if own else "nothing was replaced"
    rows = (
        (own or not parts, f"Attention layers {gone}", f"{len(own)} of {every}", detail),
        (mlps, f"MLPs {gone}", f"{len(mlps)} of {every}", numbered(mlps)),
        (spans, "Spans, each by one map", str(len(spans)), listed(spans).replace("span", "layers", 1)),
        (report.graph.before.kv_pairs, "KV cache", change, f"{before:,} → {after:,} bytes per token"),
    )
    return [Headline(*row) for shown, *row in rows if shown]


def numbered(blocks: Sequence[Block]) -> str:
    """Which: layer 2; layers 0, 3-5; layer 2; MLP 1."""
    own = len(attentions(blocks))
    return (f"layer{'s' * (own > 1)} " if own else "") + listed(blocks)


def _loss(loss: MethodLoss | Likeness) -> list[Headline]:
    if isinstance(loss, Likeness):
        on = f"held-out {loss.unit}"
        found = [(m.what, number(m.value, ".4f"), number(m.se, ".4f")) for m in loss.measures[:1]]
    else:
        ratio, se, on = loss.perplexity_ratio, loss.perplexity_ratio_se, f"{loss.tokens:,} held-out tokens"
        found = [("Perplexity", f"× {number(ratio, '.3f')}", number(se, ".3f"))]
    known = loss.documents > 1
    return [Headline(name, value, (f"± {error}, " if known else "") + on) for name, value, error in found]


def _speedups(speed: Speed, where: str, against: str) -> Iterator[Headline]:
    """Of each phase at the longest context."""
    found = speed.speedups()
    for phase in dict.fromkeys(cell.phase for cell, _, _ in found):
        cell, result, over = max((f for f in found if f[0].phase == phase), key=lambda f: f[0].context)
        said = [f"at {cell.context:,} tokens{against}{'' if over.resolved else ', not resolved'}"]
        name, value = f"{phase.capitalize()} {where}", f"{number(over.value, '.2f')}×"
        yield Headline(name, value, "; ".join(filter(None, [*said, ceiling_in_words(result)])))


def ceiling_in_words(result: Result) -> str:
    """The ceiling of a speedup and, if that is above it, why; empty if there is none."""
    if result.ceiling is None or result.over_base is None:
        return ""
    shown = f"{number(result.ceiling, '.2f')}×"
    return {
        False: f"ceiling {shown}",
        True: f"above its ceiling of {shown}, which counts multiplications and bytes only",
        None: f"ceiling {shown}, exceeded within the noise",
    }[result.above_ceiling]


def _parity(parity: DecoderParity | EncoderParity) -> Headline:
    if isinstance(parity, EncoderParity):
        differences = figure(worst(o.max_rel for o in parity.outputs))
        return Headline("Parity", differences, "max relative difference to PyTorch")
    return Headline("Parity", figure(worst(s.max_abs for s in parity.steps)), "max |Δlogit| to PyTorch")


def measured_on(environment: Environment) -> tuple[str, str]:
    """The machine, and the packages, each in a line."""
    machine = (
        f"{environment.processor}, {environment.cores} cores, {environment.memory_gib} GiB, "
        f"{environment.system}, Python {environment.python}"
    )
    return machine, ", ".join(f"{name} {version}" for name, version in environment.packages.items())


def making(report: Report) -> list[tuple[str, str]]:
    """How the report was made, as pairs of a word and what it stands for."""
    chosen, graph, dtype = report.selection, report.graph, report.selection.calibration_dtype
    machine, packages = measured_on(report.environment)
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
        ("Graphs", f"{graph.precision}, {graph.task or f'{graph.kv_cache} KV cache'}, opset {graph.opset}"),
        ("Stages, seconds", ", ".join(seconds)),
        ("Measured on", machine),
        ("Packages", packages),
        ("Model fingerprint", report.model.fingerprint),
    ]
