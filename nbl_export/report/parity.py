"""The tables of parity: a decoder's step by step, an encoder's output by output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nbl_export.report.drawing import Table, figure, percent
from nbl_export.verify.parity.figures import (
    LOGITS,
    DecoderParity,
    EncoderParity,
    Figures,
    Gates,
    Parity,
)

_TITLE = "Parity: linearized PyTorch against the rewritten graph"
_FIGURES: Mapping[str, Callable[[Figures], float]] = {
    "max |Δ|": lambda f: f.max_abs,
    "mean |Δ|": lambda f: f.mean_abs,
    "p99 |Δ|": lambda f: f.p99_abs,
    "max rel": lambda f: f.max_rel,
    "mean rel": lambda f: f.mean_rel,
    "p99 rel": lambda f: f.p99_rel,
    "1-cos": lambda f: 1 - f.min_cosine,
    "KL": lambda f: f.max_kl,
}
_BRIEF_STEP = ("max |Δ|", "p99 |Δ|", "max rel", "1-cos", "KL")
_BRIEF_OUTPUT = ("max |Δ|", "max rel", "1-cos")
_FULL_OUTPUT = ("max |Δ|", "mean |Δ|", "p99 |Δ|", "max rel", "mean rel", "1-cos")


def parity_table(parity: DecoderParity | EncoderParity, brief: bool = False) -> Table:
    """One row for each step or output of the parity run; ``brief`` keeps what 80 columns hold."""
    if isinstance(parity, EncoderParity):
        return _outputs_table(parity, brief)
    return _steps_table(parity, brief)


def _steps_table(parity: DecoderParity, brief: bool) -> Table:
    columns = _BRIEF_STEP if brief else tuple(_FIGURES)
    rows = []
    for s in parity.steps:
        name = "prefill" if s.step == 0 else f"step {s.step}"
        rows.append((name, str(s.tokens), *_cells(s, columns), percent(s.top1), figure(s.kv_max_rel)))
    gates = (
        ("max |Δlogit| ≤ {:g}", lambda g: g.max_abs_logit),
        ("cosine ≥ {:g}", lambda g: g.min_cosine),
        ("KL ≤ {:g}", lambda g: g.max_kl),
        (f"top-1 {{:.0%}} up to near-ties of {parity.gates.near_tie:g}", lambda g: g.top1),
        ("KV ≤ {:g}", lambda g: g.max_rel_kv),
    )
    return Table(
        _TITLE,
        ("", "n", *columns, "top-1", "KV rel"),
        tuple(rows),
        f"{_gates(parity.gates, gates)}Prompts of {', '.join(map(str, parity.prompt_lengths))} tokens, ragged in "
        f"one batch{_alone(parity)}; then teacher-forced decode steps with each side's own cache. Changing the "
        "embeddings' last bit "
        f"moves the PyTorch model's own logits by {figure(parity.rounding_noise)}.{_own_of_steps(parity)}"
        f"{_crossings(parity)}{_routing(parity)}",
    )


def _alone(parity: DecoderParity | EncoderParity, how: str = "by itself") -> str:
    """The rows that cross lengths, in the sentence about rows."""
    prompts = sorted({prompt for one in parity.crossings for prompt in one.prompts})
    return f", and of {', '.join(map(str, prompts))} tokens each {how}" if prompts else ""


def _crossings(parity: DecoderParity | EncoderParity) -> str:
    """How each length of the model was crossed."""
    if not parity.crossings:
        return ""
    return f" Lengths from which on the model computes something else: {'; '.join(c.said for c in parity.crossings)}."


def _routing(parity: DecoderParity) -> str:
    """How a graph's choices of experts differ from PyTorch's, if they do."""
    return f" {parity.routing.said}." if parity.routing else ""


def _own_of_steps(parity: DecoderParity) -> str:
    """What is lost in the graph's precision anyway, for a graph that is not float32."""
    for own, whose in (
        (parity.pytorch_in_precision, f"PyTorch itself in {parity.precision}, on the same tokens"),
        (
            parity.base_graph,
            f"The unmodified {parity.precision} graph against unmodified PyTorch, on the same tokens",
        ),
    ):
        if own:
            theirs = Parity(parity.prompt_lengths, own, parity.gates)
            return (
                f" {whose}: max |Δlogit| {figure(theirs.worst)}, mean {figure(theirs.mean_abs)}; this graph's mean, "
                f"{figure(parity.mean_abs)}, may be {parity.gates.max_vs_own:g} times that."
            )
    return ""


def _outputs_table(parity: EncoderParity, brief: bool) -> Table:
    columns = _BRIEF_OUTPUT if brief else _FULL_OUTPUT
    heads = any(o.output == LOGITS for o in parity.outputs)
    rows = []
    for o in parity.outputs:
        classes = [figure(o.max_kl), percent(o.top1)] if o.output == LOGITS else ["", ""]
        rows.append((o.output, str(o.tokens), *_cells(o, columns), *(classes if heads else [])))
    gates: list[_Limit] = [
        ("states and vectors: max rel ≤ {:g}", lambda g: g.max_rel_state),
        ("cosine ≥ {:g}", lambda g: g.min_cosine),
    ]
    if heads:
        gates += [
            ("|Δlogit| ≤ {:g}", lambda g: g.max_abs_logit),
            ("KL ≤ {:g}", lambda g: g.max_kl),
            ("top-1 {:.0%}", lambda g: g.top1),
        ]
    lengths = ", ".join(map(str, parity.lengths))
    what = (
        f"Texts of {lengths} tokens, padded to one batch" if lengths else f"One batch of {parity.rows} images"
    )
    return Table(
        _TITLE,
        ("", "n", *columns, *(("KL", "top-1") if heads else ())),
        tuple(rows),
        f"{_gates(parity.gates, gates)}{what}{_alone(parity, 'beside a short one')}; only real tokens are compared."
        f"{_own_of_outputs(parity)}{_crossings(parity)}",
    )


def _own_of_outputs(parity: EncoderParity) -> str:
    if not parity.pytorch_in_precision:
        return ""
    means = "; ".join(f"{o.output} {figure(o.mean_abs)}" for o in parity.pytorch_in_precision)
    return (
        f" PyTorch itself in {parity.precision}, on the same batch, has a mean |Δ| of: {means}; this graph's may be "
        f"{parity.gates.max_vs_own:g} times that."
    )


def _cells(figures: Figures, columns: Sequence[str]) -> list[str]:
    return [figure(_FIGURES[column](figures)) for column in columns]


# How a gate is said, and its limit.
_Limit = tuple[str, Callable[[Gates], float]]


def _gates(gates: Gates, limits: Sequence[_Limit]) -> str:
    """The limits that there are; of those that bound nothing nothing is said."""
    none = Gates()
    held = [text.format(limit(gates)) for text, limit in limits if limit(gates) != limit(none)]
    return f"Gates: {', '.join(held)}. " if held else ""
