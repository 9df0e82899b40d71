"""What a race gives: one candidate's result, a cell of them, and all cells with the machine that they were timed on.

Plain values, written by :func:`nbl_export.records.to_json` and read by :func:`nbl_export.records.from_json`. Verify,
bench, engines and the K curve all give a :class:`Speed`; what differs between them is data in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from nbl_export.workspace import LINEARIZED

PREFILL, DECODE, ENCODE = "prefill", "decode", "encode"
# The base graph in a second session.
CONTROL = "base again"
# Rounds of which a 95 % interval of the median is known: fewer have none.
LEAST_ROUNDS = 6


# the machine and the work -----------------------------------------------------------------------------


# Multiply-adds, and bytes read or written, that can go on at the same time.
Work = tuple[float, float]


@dataclass(frozen=True)
class Roofline:
    """Multiply-adds and bytes per second of ``device`` in ``dtype``, with ``threads`` on a CPU."""

    device: str
    dtype: str
    threads: int | None
    macs_per_second: float
    bytes_per_second: float

    def seconds(self, work: Sequence[Work]) -> float:
        """The least time for pieces of work that follow each other."""
        return sum(max(macs / self.macs_per_second, size / self.bytes_per_second) for macs, size in work)


@dataclass(frozen=True)
class Machine:
    """What a race runs on: ``device`` is an execution provider with its ``threads``, or a GPU.

    Without a ``roofline``, where it was not measured, there are no ceilings.
    """

    device: str
    threads: int | None = None
    compute_capability: str | None = None
    roofline: Roofline | None = None


@dataclass(frozen=True)
class GraphCost:
    """Per token: multiply-adds with constant weights, multiply-adds of attention per token of context,
    bytes of weights read, bytes of KV cache per token of context; and those multiply-adds and bytes of weights that
    only the last token of a prefill needs, since they make its logits.

    ``expert_bytes`` are those of all experts. Each token reads ``expert_share`` of them, others or the same ones.
    """

    weight_macs: int
    attention_macs_per_context: int
    weight_bytes: int
    kv_bytes_per_token: int
    last_macs: int = 0
    last_bytes: int = 0
    expert_bytes: int = 0
    expert_share: float = 0.0

    def __sub__(self, saved: GraphCost) -> GraphCost:
        left = {f.name: getattr(self, f.name) - getattr(saved, f.name) for f in fields(GraphCost)}
        return GraphCost(**left | {"expert_share": self.expert_share if left["expert_bytes"] else 0.0})

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights that are in memory, read or not."""
        return self.weight_bytes + self.expert_bytes

    def read_bytes(self, tokens: int) -> float:
        """Bytes of weights that ``tokens`` are expected to read, each sent to experts by chance."""
        return self.weight_bytes + self.expert_bytes * (1 - (1 - self.expert_share) ** tokens)

    def prefill(self, tokens: int, batch: int = 1) -> list[Work]:
        """A prefill of ``batch`` rows of ``tokens``: attention over the full square, as runtimes compute it."""
        every = self.weight_macs - self.last_macs
        rows = batch * tokens
        return [
            (rows * every, self.read_bytes(rows) - self.last_bytes),
            (batch * self.last_macs, self.last_bytes),
            (rows * tokens * self.attention_macs_per_context, rows * self.kv_bytes_per_token),
        ]

    def decode(self, context: int, batch: int = 1) -> list[Work]:
        """One token for each of ``batch`` rows after ``context`` tokens."""
        cache = batch * context
        return [
            (batch * self.weight_macs, self.read_bytes(batch)),
            (cache * self.attention_macs_per_context, cache * self.kv_bytes_per_token),
        ]

    def work(self, phase: str, context: int, batch: int = 1) -> list[Work]:
        """Of one cell; an encoder's pass is like a prefill."""
        return self.decode(context, batch) if phase == DECODE else self.prefill(context, batch)


# one candidate ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Milliseconds per prefill or encoder pass, or per decoded token: median and quartiles over the rounds.

    ``p99_ms`` is the 99th percentile of single passes and steps, where latency is asked for (engines).
    """

    median_ms: float
    low_ms: float
    high_ms: float
    p99_ms: float | None = None


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one candidate is as another: the median over rounds, each round a pair.

    ``low``/``high`` are its quartiles, ``least``/``most`` a 95 % interval of the median, without bounds where there
    are fewer than six pairs. ``resolved`` is False where that interval holds 1, or the base's own median is known
    less well than the effect is large.
    """

    value: float
    low: float
    high: float
    least: float
    most: float
    resolved: bool


@dataclass(frozen=True)
class CandidateInfo:
    """What is written of a candidate: its name, the name of its own base, and what its graph costs."""

    name: str
    base: str | None = None
    cost: GraphCost | None = None


@dataclass(frozen=True)
class Result:
    """One candidate in one cell.

    ``cache_bytes``: the filled cache and work space, as far as the runtime tells; ``peak_bytes``: of a process that
    does only this. ``of_roofline`` is the share of its time that the machine's roofline needs at least. ``over_base``
    compares with its own base and stands beside ``ceiling``. ``linearized_over`` says how many times as fast the
    linearized candidate is.
    """

    name: str
    timing: Timing
    rounds: int
    tokens_per_second: float
    cache_bytes: int | None = None
    peak_bytes: int | None = None
    of_roofline: float | None = None
    over_base: Ratio | None = None
    ceiling: float | None = None
    linearized_over: Ratio | None = None

    @property
    def above_ceiling(self) -> bool | None:
        """Whether the speedup is certainly above its ceiling; None for one whose interval reaches down to it."""
        over, limit = self.over_base, self.ceiling
        if over is None or limit is None or not over.value > limit:
            return False
        return True if over.least > limit else None


# cells --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CellResult:
    """All candidates in one phase with ``batch`` rows of ``context`` tokens; who is ``absent``, and why."""

    phase: str
    batch: int
    context: int
    results: tuple[Result, ...]
    absent: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As it stands in tables and verdicts: ``decode 4 × 512``."""
        return f"{self.phase} {self.size}"

    @property
    def size(self) -> str:
        """Rows and tokens: ``4 × 512``, or ``512`` for one row."""
        return (f"{self.batch} × " if self.batch > 1 else "") + f"{self.context:,}"

    def of(self, name: str) -> Result | None:
        """The result of the candidate ``name``, if it was timed here."""
        return next((r for r in self.results if r.name == name), None)


@dataclass(frozen=True)
class Speed:
    """All cells of a race, the machine, who took part, and the least number of rounds.

    ``linearized`` names the candidate that the race is about.
    """

    machine: Machine
    rounds: int
    candidates: tuple[CandidateInfo, ...]
    cells: tuple[CellResult, ...]
    linearized: str = LINEARIZED

    @property
    def phases(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c.phase for c in self.cells))

    @property
    def base(self) -> str | None:
        """The name of the graph or engine that the linearized one was made from."""
        return next((c.base for c in self.candidates if c.name == self.linearized), None)

    @property
    def has_percentiles(self) -> bool:
        """Whether single passes were looked at, and not rounds alone."""
        return any(r.timing.p99_ms is not None for c in self.cells for r in c.results)

    def speedups(self) -> list[tuple[CellResult, Result, Ratio]]:
        """The linearized candidate in each cell in which it was timed beside its base, and how much faster it is."""
        found = [(cell, cell.of(self.linearized)) for cell in self.cells]
        return [(cell, result, result.over_base) for cell, result in found if result and result.over_base]

    def absent(self) -> dict[tuple[str, str], list[CellResult]]:
        """Who was not timed and why, and in which cells."""
        found: dict[tuple[str, str], list[CellResult]] = {}
        for cell in self.cells:
            for pair in cell.absent.items():
                found.setdefault(pair, []).append(cell)
        return found
