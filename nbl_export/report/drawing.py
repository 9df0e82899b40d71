"""Write numbers, layers, verdicts and headlines of a report as text, and hold what a table shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePath
from typing import Any, NamedTuple

from nbl_export.blocks import SPAN, Block, Mlp, Span, all_parts, attentions, layer_of
from nbl_export.linearize.selection import CurvePoint, Loss
from nbl_export.models.source import ModelIdentity
from nbl_export.report.schema import Environment, Report, Selection
from nbl_export.verify.parity.figures import DecoderParity, EncoderParity, Likeness, MethodLoss
from nbl_export.verify.speed.values import Result, Speed

# How a fit is said, after "W and b are"; nbl_export/linearize/fits.py has them all.
_FITS = {
    "lmmse": "the LMMSE fit",
    "weighted": "the weighted fit (tokens by 1/‖h‖²)",
    "sequential": "the sequential fit",
    "drop": "zero (the layers are dropped)",
}


@dataclass(frozen=True)
class Table:
    """A title, column headings and rows of text; ``note`` explains what the columns mean.

    ``plot`` names the plot of the same figures, where there may be one; ``marked`` are the rows that were chosen;
    ``problems`` are sentences on what will not go well, each on a line of its own.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    plot: str = ""
    marked: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def number(value: Any, spec: str) -> str:
    """``value`` formatted; what is no finite number (nan, inf, also as text) stays itself."""
    return format(value, spec) if isinstance(value, (int, float)) and math.isfinite(value) else str(value)


def figure(value: Any) -> str:
    """1.2e-5: two digits, the exponent without its zero."""
    mantissa, e, exponent = number(value, ".1e").partition("e")
    return "0" if value == 0 else f"{mantissa}e{int(exponent)}" if e else mantissa


def milliseconds(value: float, like: float | None = None) -> str:
    """With the more decimals the shorter; with those of another time where it is ``like`` that."""
    own = value if like is None else like
    return number(value, ".1f" if own >= 10 else ".2f" if own >= 1 else ".3f")


def finite(value: Any) -> float | None:
    """``value`` if it is a number that can be drawn; a report writes nan and inf as text."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def worst(values: Iterable[float]) -> float:
    """The largest; what is no number is worse than any."""
    return max(values, key=lambda v: (v != v, v))


def listed(blocks: Sequence[Block]) -> str:
    """0, 7, 24-29: attentions by their layers, runs of three and more drawn together; then MLP 3, 12-14; span 8-9."""
    mlps = [block.layer for block in blocks if isinstance(block, Mlp)]
    spans = [str(block).removesuffix(f".{SPAN}") for block in sorted(blocks) if isinstance(block, Span)]
    parts = ("", _runs(attentions(blocks))), ("MLP ", _runs(mlps)), ("span ", ", ".join(spans))
    return "; ".join(name + part for name, part in parts if part)


def _runs(numbers: Sequence[int]) -> str:
    """A run are numbers that are as far from their places as the first of it."""
    placed = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    runs = [[n for _, n in run] for _, run in placed]
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs)


# a report in a few words ---------------------------------------------------------------------------


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
        cost += _beyond_selection(report.selection, loss)
    if isinstance(loss, MethodLoss):
        bound = report.asked("method_loss").get("bound") or {}
        bounds = (("perplexity ×", bound.get("max_perplexity_ratio")), ("KL", bound.get("max_kl")))
        limits = [f"{what} {number(limit, 'g')}" for what, limit in bounds if limit is not None]
        cost += f", at most {' and '.join(limits)} asked" if limits else ", no bound asked"
    left_out = ", ".join(n for n in skipped if not (n == "method loss" and loss))
    said = [f"({', '.join(failed or passed or ['nothing was checked'])})", cost]
    return "; ".join([*said, *([f"skipped: {left_out}"] if left_out else [])])


def _beyond_selection(selection: Selection, loss: MethodLoss) -> str:
    """What to do where held-out text loses more than the selection text, by more than both standard errors."""
    points = selection.curve.points if selection.curve else ()
    known: CurvePoint | Loss | None = next((p for p in points if p.layers == selection.layers), None)
    if selection.result and selection.result.loss:
        known = selection.result.loss
    if known is None or known.perplexity_ratio_se is None:
        return ""
    own, error = known.perplexity_ratio, known.perplexity_ratio_se
    errors = error / own + loss.perplexity_ratio_se / loss.perplexity_ratio
    if not math.log(loss.perplexity_ratio / own) > errors:
        return ""
    return f" (× {number(own, '.3f')} on the selection text: choose on more of it, --selection-samples)"


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


def fit_in_words(selection: Selection) -> str:
    """How W and b were fitted, and repaired."""
    words, rank = _FITS.get(selection.fit, selection.fit), rank_in_words(selection)
    if selection.fit != "drop":
        by = "chosen by held-out error" if selection.ridge is None else number(selection.ridge, "g")
        words += f" on the {selection.fit_input} input, ridge {by}"
    words += f"; then {selection.repair:,} steps of distillation" if selection.repair else ""
    lost = (selection.result and selection.result.rank_lost) or {}
    least = (
        f", which loses at most {max(lost.values()):.2%} of the variance of a layer's output" if lost else ""
    )
    return words + (f"; W {rank}{least}" if rank else "")


def rank_in_words(selection: Selection) -> str:
    """The rank that every W has, or those that were chosen; empty where W is whole."""
    ranks = selection.result.ranks if selection.result else None
    if selection.rank or ranks is None:
        return f"of rank {selection.rank}" if selection.rank else ""
    if not ranks:
        return "whole, since no rank is without loss"
    low, high = min(ranks.values()), max(ranks.values())
    return f"of rank {low}{f' to {high}' if high > low else ''} in {len(ranks)} of {len(selection.layers)} layers"
