"""What a parity run finds, and the gates it is held to: values alone, which import nothing heavy.

A decoder is compared step by step, an encoder output by output; both by the same :class:`Figures` of vectors, the same
gates, and the same comparison with what is lost in the graph's precision anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from nbl_export.datafile import read_table

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


# What is held to a gate: any figures, or a step's alone.
F = TypeVar("F", bound=Figures, contravariant=True)


@dataclass(frozen=True)
class _Gate(Generic[F]):
    """One figure, what it is called, its limit, and whether it must not be below it (else not above)."""

    name: str
    figure: Callable[[F], float]
    limit: Callable[[Gates], float]
    at_least: bool = False

    def worst(self, found: Sequence[F]) -> int:
        """The place of the first of those whose figure is worst; NaN is worse than any number."""
        values = [self.figure(one) for one in found]
        ranks = [(value != value, -value if self.at_least else value) for value in values]
        return ranks.index(max(ranks))

    def failure(self, one: F, gates: Gates, of: str = "", at: str = "") -> list[str]:
        """A sentence if ``one`` does not keep the gate, which says ``of`` what or ``at`` which step; else none."""
        value, limit = self.figure(one), self.limit(gates)
        # Written so that NaN fails.
        if value >= limit if self.at_least else value <= limit:
            return []
        # A cosine of 0.9996 rounded as it is would be the 1 that it is not.
        shown = 1 - float(f"{1 - value:.3g}") if self.at_least else float(f"{value:.3g}")
        return [f"{self.name}{of} is {shown:.9g}{at}; the gate is {limit:g}"]


_MAX_LOGIT: _Gate[Figures] = _Gate("max |Δlogit|", lambda f: f.max_abs, lambda g: g.max_abs_logit)
_KL: _Gate[Figures] = _Gate("KL", lambda f: f.max_kl, lambda g: g.max_kl)
_TOP1: _Gate[Figures] = _Gate("top-1 agreement", lambda f: f.top1, lambda g: g.top1, at_least=True)
_COSINE: _Gate[Figures] = _Gate("cosine", lambda f: f.min_cosine, lambda g: g.min_cosine, at_least=True)
_STATE: _Gate[Figures] = _Gate("max relative difference", lambda f: f.max_rel, lambda g: g.max_rel_state)
_CACHE: _Gate[StepParity] = _Gate("KV relative error", lambda s: s.kv_max_rel, lambda g: g.max_rel_kv)
_OF_STEPS: tuple[_Gate[StepParity], ...] = (_MAX_LOGIT, _COSINE, _KL, _TOP1, _CACHE)


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
        found = []
        for gate in _OF_STEPS:
            step = self.steps[gate.worst(self.steps)]
            found += gate.failure(step, self.gates, at=f" at step {step.step}")
        return found

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
                found += gate.failure(one, self.gates, of=f" of {one.output}")
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
