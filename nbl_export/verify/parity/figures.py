"""Hold the figures of parity to their gates, and say what linearizing costs: values that import nothing heavy.

A decoder is compared step by step, an encoder output by output; both by the same :class:`Figures` of vectors, the same
gates, and the same comparison with what is lost in the graph's precision anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nbl_export.files import read_table

LOGITS = "logits"
# The gates of a rewritten graph against the unmodified one with the linear layers put in, of any dtype.
UNMODIFIED = "unmodified"
# The cosine of two short vectors of logits near zero tells of rounding, not of the graph.
_LEAST_WIDTH = 16


@dataclass(frozen=True)
class Gates:
    """The limits of one dtype, from ``gates.toml``; what is not there does not limit."""

    max_abs_logit: float = float("inf")
    min_cosine: float = -1.0
    max_kl: float = float("inf")
    top1: float = 0.0
    near_tie: float = 0.0
    max_rel_kv: float = float("inf")
    max_rel_state: float = float("inf")
    max_vs_own: float = float("inf")


def gates_for(dtype: str) -> Gates:
    """The gates of a dtype such as ``float32``."""
    return Gates(**read_table(Path(__file__).parent / "gates.toml")[dtype])


@dataclass(frozen=True)
class Figures:
    """How far ``tokens`` vectors are from the reference's; what each figure is: :mod:`.vectors`."""

    tokens: int
    max_abs: float
    mean_abs: float
    p99_abs: float
    max_rel: float
    mean_rel: float
    p99_rel: float
    min_cosine: float
    max_kl: float
    top1: float
    near_ties: int


@dataclass(frozen=True)
class StepParity(Figures):
    """The logits of one forward pass, and the cache after it: step 0 is the prefill, the others decode one token each.

    The cache's figures are 0, and ``kv_worst_layer`` None, where none is compared.
    """

    step: int
    kv_max_abs: float = 0.0
    kv_max_rel: float = 0.0
    kv_mean_rel: float = 0.0
    kv_worst_layer: int | None = None


@dataclass(frozen=True)
class OutputParity(Figures):
    """The vectors of one ``output`` of an encoder, each of ``width`` numbers."""

    output: str
    width: int


# Each gate: what its figure is called, the figure and its limit by name. Those of _AT_LEAST must not be below it.
_MAX_LOGIT = ("max |Δlogit|", "max_abs", "max_abs_logit")
_COSINE = ("cosine", "min_cosine", "min_cosine")
_KL = ("KL", "max_kl", "max_kl")
_TOP1 = ("top-1 agreement", "top1", "top1")
_CACHE = ("KV relative error", "kv_max_rel", "max_rel_kv")
_STATE = ("max relative difference", "max_rel", "max_rel_state")
_AT_LEAST = (_COSINE, _TOP1)


def _failure(gate: tuple[str, str, str], found: Sequence[Figures], gates: Gates, of: str = "") -> list[str]:
    """A sentence if the worst of those ``found``, the first if several are, does not keep the ``gate``; else none."""
    (name, figure, bound), at_least = gate, gate in _AT_LEAST
    # NaN is worse than any number.
    ranks = [(v != v, -v if at_least else v) for v in (getattr(one, figure) for one in found)]
    worst = found[ranks.index(max(ranks))]
    value, limit = getattr(worst, figure), getattr(gates, bound)
    # Written so that NaN fails.
    if value >= limit if at_least else value <= limit:
        return []
    # A cosine of 0.9996 rounded as it is would be the 1 that it is not.
    shown = 1 - float(f"{1 - value:.3g}") if at_least else float(f"{value:.3g}")
    at = f" at step {worst.step}" if isinstance(worst, StepParity) else ""
    return [f"{name}{of} is {shown:.9g}{at}; the gate is {limit:g}"]


def _beyond_own(gates: Gates, whose: str, compared: Iterable[tuple[str, float, float]]) -> list[str]:
    """A sentence for each of what was ``compared`` (its name, its mean |Δ|, the own one) that loses too much."""
    limit = gates.max_vs_own
    return [
        f"{name} is {here:.3g}, {whose} {allowed:.3g}; the gate is {limit:g} times that"
        for name, here, allowed in compared
        if not here <= limit * allowed
    ]


@dataclass(frozen=True)
class Parity:
    """The comparison of a decoder's whole run: prompt lengths, every step, and the gates they are held to."""

    prompt_lengths: tuple[int, ...]
    steps: tuple[StepParity, ...]
    gates: Gates

    def failures(self) -> list[str]:
        """One sentence for each gate that fails, with the worst value and its step; empty is a pass."""
        gates = (_MAX_LOGIT, _COSINE, _KL, _TOP1, _CACHE)
        return [said for gate in gates for said in _failure(gate, self.steps, self.gates)]

    def failures_against(self, own: Parity, whose: str) -> list[str]:
        """Like :meth:`failures`, against what is lost in this precision anyway: ``own``, and ``whose`` that is."""
        return _beyond_own(self.gates, whose, [("mean |Δlogit|", self.mean_abs, own.mean_abs)])

    @property
    def mean_abs(self) -> float:
        """Mean |Δlogit|, each step counting once."""
        return sum(s.mean_abs for s in self.steps) / len(self.steps)

    @property
    def worst(self) -> float:
        """The largest |Δlogit|."""
        return max(s.max_abs for s in self.steps)


@dataclass(frozen=True)
class OutputsParity:
    """The comparison of an encoder: its outputs, the lengths of the rows (none for images), and the gates."""

    rows: int
    lengths: tuple[int, ...]
    outputs: tuple[OutputParity, ...]
    gates: Gates

    def failures(self) -> list[str]:
        """One sentence for each gate that fails; empty is a pass."""
        found = []
        for one in self.outputs:
            held = (_MAX_LOGIT, _KL, _TOP1) if one.output == LOGITS else (_STATE,)
            for gate in (*held, *([_COSINE] if one.width >= _LEAST_WIDTH else [])):
                found += _failure(gate, [one], self.gates, f" of {one.output}")
        return found

    def failures_against(self, own: OutputsParity, whose: str) -> list[str]:
        """Like :meth:`failures`, against what is lost in this precision anyway: ``own``, and ``whose`` that is."""
        pairs = zip(self.outputs, own.outputs, strict=True)
        compared = [(f"mean |Δ| of {a.output}", a.mean_abs, b.mean_abs) for a, b in pairs]
        return _beyond_own(self.gates, whose, compared)

    @property
    def worst(self) -> float:
        """The largest difference of any number, relative to the size of its vector."""
        return max(o.max_rel for o in self.outputs)


# a report's sections -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Crossing:
    """How a length was crossed from which on a model computes something else; ``key`` of the configuration says it.

    ``how``: by ``rows`` of this parity, and of these ``prompts``; on a ``copy`` of the model, in which it is ``small``,
    before calibration; ``never`` reached, being beyond the model's positions; or ``not``, and ``why``. ``layers`` are
    those that it concerns.
    """

    key: str
    tokens: int
    layers: tuple[int, ...]
    how: Literal["rows", "copy", "never", "not"]
    prompts: tuple[int, ...] = ()
    small: int | None = None
    why: str = ""

    @property
    def said(self) -> str:
        """As reports say it."""
        how = {
            "rows": "crossed by the rows",
            "copy": f"crossed on a copy with {self.small}",
            "never": f"never reached ({self.why})",
            "not": f"not crossed: {self.why}",
        }
        return f"{self.key} {self.tokens:,}: {how[self.how]}"


@dataclass(frozen=True)
class Routing:
    """How a graph sent tokens to experts: ``differing`` of its ``choices`` are not PyTorch's.

    ``worst`` is how far the scores of a choice fall short, in units of what rounding explains.
    """

    choices: int
    differing: int
    worst: float

    @property
    def said(self) -> str:
        """As reports say it."""
        return (
            f"{self.differing:,} of {self.choices:,} choices of experts are not PyTorch's own, which was run with the "
            f"graph's; their scores fall short by at most {self.worst:.2g} times what rounding explains"
        )


@dataclass(frozen=True)
class DecoderParity(Parity):
    """A decoder's parity as a report has it.

    ``rounding_noise`` is how far PyTorch's own logits move by the embeddings' last bit. What is lost in the graph's
    ``precision`` anyway: ``base_graph`` by the unmodified graph of quantized weights, ``pytorch_in_precision`` by
    PyTorch in half precision; None for a graph that is not held to it. ``crossings`` are the model's lengths, if it has
    any; the steps are also those of the prompts that cross them. ``routing`` is that of a mixture of experts; None
    where the graph chose all experts as PyTorch does.
    """

    precision: str
    rounding_noise: float
    base_graph: tuple[StepParity, ...] | None = None
    pytorch_in_precision: tuple[StepParity, ...] | None = None
    crossings: tuple[Crossing, ...] = ()
    routing: Routing | None = None


@dataclass(frozen=True)
class EncoderParity(OutputsParity):
    """An encoder's parity as a report has it; ``pytorch_in_precision`` and ``crossings``: :class:`DecoderParity`."""

    precision: str
    pytorch_in_precision: tuple[OutputParity, ...] | None = None
    crossings: tuple[Crossing, ...] = ()


@dataclass(frozen=True)
class EngineParity:
    """Parity of the engines that ran, None for one that did not."""

    linearized: Parity | None = None
    base: Parity | None = None


@dataclass(frozen=True)
class MethodLoss:
    """Perplexities on the same tokens, their ratio, mean KL in nats; standard errors over documents."""

    documents: int
    tokens: int
    perplexity_original: float
    perplexity_linearized: float
    perplexity_ratio: float
    perplexity_ratio_se: float
    kl: float
    kl_se: float


@dataclass(frozen=True)
class Measure:
    """``what`` was averaged over ``count`` vectors, and its standard error over documents."""

    what: str
    value: float
    se: float
    count: int


@dataclass(frozen=True)
class Likeness:
    """The measures of every output of an encoder on ``documents`` held-out documents or images (``unit``)."""

    documents: int
    unit: str
    measures: tuple[Measure, ...]
