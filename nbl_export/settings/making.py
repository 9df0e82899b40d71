"""Define the settings of the stages that make a plan: calibrate, select, the bounds on what may be lost, workloads."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from nbl_export.blocks import ATTENTION, LONGEST_SPAN, PARTS, SPAN, Block, block_of, parts_in
from nbl_export.errors import InputError
from nbl_export.settings import choices
from nbl_export.settings.choices import AUTO_PERPLEXITY_RATIO, MAX_RIDGE, Dtype, FitInput, FitName
from nbl_export.settings.definition import (
    AUTO,
    COST,
    LAYERS,
    MORE,
    SIZE,
    TEXT,
    Must,
    OnDevice,
    Settings,
    Task,
    at_least,
    one_of,
    options,
    refuse,
    setting,
)

_NUMBER = r"[1-9]\d{0,8}"
_PARTS = {
    "prefill": re.compile(_NUMBER),
    "decode": re.compile(f"{_NUMBER}(@{_NUMBER})?"),
    "batch": re.compile(_NUMBER),
    "weight": re.compile(r"\d{1,9}(\.\d{1,6})?"),
}


@dataclass(frozen=True)
class Workload:
    """``batch`` rows, each a prefill of ``prefill`` tokens, then ``decode`` tokens, one by one, after ``context`` ones.

    Either may be 0. ``weight`` says how often it comes among several.
    """

    prefill: int = 0
    decode: int = 0
    context: int = 0
    batch: int = 1
    weight: float = 1.0

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.prefill, self.context + self.decode)

    @property
    def middle(self) -> int:
        """Tokens before the token in the middle of a decode, which takes the mean time while the context grows."""
        return self.context + self.decode // 2


def workload_of(text: str) -> Workload | None:
    """The workload that is written ``text``; None for anything else.

    A decode without a context comes after the prefill.
    """
    parts = [part.strip().partition("=")[::2] for part in text.split(",")]
    found = dict(parts)
    if len(found) < len(parts) or not all(n in _PARTS and _PARTS[n].fullmatch(v) for n, v in parts):
        return None
    prefill, batch = (int(found.get(name, least)) for name, least in (("prefill", 0), ("batch", 1)))
    decode, _, context = found.get("decode", "").partition("@")
    after, weight = int(context or prefill) if decode else 0, float(found.get("weight", 1.0))
    if not (prefill or decode) or (decode and not after) or weight <= 0:
        return None
    return Workload(prefill, int(decode or 0), after, batch, weight)


WORKLOAD = Must(
    workload_of,
    "is {value!r}; give a prefill, a decode after a context, or both, as prefill=512,decode=128@4096,batch=4",
)


@options
@dataclass(frozen=True)
class LossBound(Settings):
    """What linearizing may cost, each None where the user bounds nothing.

    max_kl: KL to the original, in nats: the largest K within X, and a gate of verify.
    max_perplexity_ratio: Perplexity over the original's: the largest K within X, and a gate of verify.
    """

    max_kl: float | None = setting(None, COST, at_least(0, "0 nats or more"))
    max_perplexity_ratio: float | None = setting(
        None, COST, at_least(1, "1 or more (1.05 allows 5 % more)"), key="max-ppl-ratio"
    )

    def __bool__(self) -> bool:
        return any(v is not None for v in asdict(self).values())

    @property
    def bounds_loss(self) -> bool:
        return self.max_kl is not None or self.max_perplexity_ratio is not None


@options
@dataclass(frozen=True)
class Budget(LossBound):
    """Bounds that K must keep: each None where the user gave none. Speedups are those of prefill and of decode.

    min_speedup: Smallest K with prefill and decode X times as fast.
    max_weight_bytes: Weights of at most that size, by the smallest K.
    max_kv_bytes: KV cache of at most that size for --workload, by the least K.
    """

    min_speedup: float | None = setting(None, LAYERS, at_least(1, "1 or more (1.2 is a fifth faster)"))

    max_weight_bytes: str | None = setting(None, MORE, SIZE, metavar="SIZE")
    max_kv_bytes: str | None = setting(None, MORE, SIZE, metavar="SIZE")

    @property
    def bounds_size(self) -> bool:
        return self.max_weight_bytes is not None or self.max_kv_bytes is not None

    @property
    def of_loss(self) -> LossBound:
        """The bounds on the loss alone."""
        return LossBound(self.max_kl, self.max_perplexity_ratio)


NO_BOUND = LossBound()
NO_BUDGET = Budget()


def auto_budget(budget: Budget) -> Budget:
    """``--k auto``: the bounds that the user gave, or the documented default where none bounds the loss."""
    return budget if budget.bounds_loss else replace(budget, max_perplexity_ratio=AUTO_PERPLEXITY_RATIO)


_RIDGES = Must(
    lambda x: 0 <= x <= MAX_RIDGE, f"is {{value}}; it must be between 0 and {MAX_RIDGE:g}, or auto"
)


@options
@dataclass(frozen=True)
class CalibrateSettings(OnDevice):
    """What text to take, how much of it, and what the model reads it in; moments are float64 in any case.

    calibration: A .txt, .jsonl or .parquet file, a folder, a glob, or a Hub data set. Repeatable. self: text that the
        model writes.
    samples: Rows of calibration tokens.
    seq_len: Tokens per row.
    heldout_samples: Rows of held-out tokens, to measure the method loss on.
    selection_samples: Rows of tokens to choose layers on.
    text_field: Text field of .jsonl, .parquet or Hub rows.
    blocks: What may become linear (all: spans, too).
    seed: Seed of everything random.
    calibration_dtype: Precision of the model while it reads the text. auto: bfloat16 where the processor multiplies it.
    memory: What the states of the text between two blocks may take; more than that is kept in files.
    """

    unrecorded = ("device", "memory")

    calibration: tuple[str, ...] = setting((choices.SELF,), TEXT, metavar="TEXT", repeated=True)
    samples: int = setting(128, TEXT, at_least(1))
    seq_len: int = setting(512, TEXT, at_least(8))
    heldout_samples: int = setting(24, MORE, at_least(1))
    selection_samples: int = setting(8, MORE, at_least(1))
    text_field: str = setting("text", MORE)
    blocks: Literal["attention", "mlp", "both", "all"] = setting(
        ATTENTION, LAYERS, metavar="attention|mlp|both|all"
    )
    seed: int = setting(0, MORE)
    calibration_dtype: Dtype = setting(AUTO, MORE, metavar="DTYPE")
    memory: str | None = setting(None, MORE, SIZE, metavar="SIZE", shown="half of what is free")

    @property
    def parts(self) -> tuple[str, ...]:
        """What may become linear: parts of a layer, and spans of layers."""
        return {"both": PARTS, "all": (*PARTS, SPAN)}.get(self.blocks, (self.blocks,))

    @property
    def longest(self) -> int:
        """The most layers that rows go through for one block."""
        return LONGEST_SPAN if SPAN in self.parts else 1

    @property
    def at_once(self) -> int:
        """The most blocks that begin with one layer, whose moments are collected together."""
        return sum(self.longest if part == SPAN else 1 for part in self.parts)

    def check(self) -> None:
        super().check()
        mixed = choices.SELF in self.calibration and len(self.calibration) > 1
        refuse((mixed, "--calibration self stands alone: it cannot be mixed with files."))


@options
@dataclass(frozen=True)
class SelectSettings(OnDevice):
    """Which layers, the ``k`` best by a criterion, as many as ``budget`` allows, or exactly ``layers``; how fitted.

    ``criterion`` None is what suits the task, ``ridge`` None is chosen by held-out error. The word ``auto`` makes a
    budget of ``k``, None of ``ridge``, and None and ``auto_rank`` of ``rank``.

    k: Layers to linearize. auto: as --max-ppl-ratio 1.10.
    layers: Exactly these: 3,7 (attention), 7.mlp, whole layers 8-9.span.
    workload: Rank by loss per time saved in prefill=512,decode=128@4096.
    criterion: Rank layers by: greedy (KL, one after the other), kl (each alone), linearity (error × sensitivity),
        nmse (fit error), cca (the paper's bound), drop (KL when left out).
    fit_input: Fit on the residual stream after (normed) or before (residual) the input norm.
    ridge: Ridge relative to each channel's variance; grows if Cholesky fails. auto: by held-out error.
    fit: lmmse (the paper's), weighted (outlier tokens count less), sequential (each after those before it),
        drop (W, b = 0).
    repair: Distil W, b and the subsequent MLPs for so many steps of 1,024 tokens.
    repair_rank: Rank of the repair's change to the MLPs, merged into their weights. 0: W and b only.
    rank: Store W as factors of that rank. auto: where it costs nothing.
    synthetic: Let greedy search look at synthetic rows, too: repeats, formats, look-ups, few-shot examples.
    seed: Seed of everything random.
    """

    k: int | None = setting(
        None, LAYERS, at_least(0, "between 0 and the model's attention layers"), metavar="K|auto", auto=True
    )
    layers: tuple[Block, ...] | None = setting(
        None,
        LAYERS,
        read=block_of,
        like="layers with commas, as 3,7,12; the MLP of a layer is 7.mlp, whole layers are 7-9.span",
    )
    workload: tuple[str, ...] = setting((), LAYERS, WORKLOAD, metavar="WORK", repeated=True)
    criterion: str | None = setting(
        None,
        MORE,
        one_of(choices.CRITERIA),
        shown=f"{choices.DECODER_CRITERION}; {choices.ENCODER_CRITERION} for encoders",
    )
    fit_input: FitInput = setting("normed", MORE)
    ridge: float | None = setting(choices.DEFAULT_RIDGE, MORE, _RIDGES, auto=True)
    fit: FitName = setting("lmmse", MORE)
    repair: int = setting(0, MORE, at_least(0, "0 steps or more"), metavar="STEPS")
    repair_rank: int = setting(16, MORE, at_least(0, "0 (the maps alone) or more"), metavar="R")
    rank: int | None = setting(None, MORE, at_least(1, "1 or more"), metavar="R|auto", auto=True)
    synthetic: bool = setting(True, MORE)
    seed: int = setting(0, MORE)
    budget: Budget = NO_BUDGET
    auto_rank: Annotated[bool, Parameter(parse=False)] = False  # no option: what the word makes of the rank

    def __post_init__(self) -> None:
        super().__post_init__()
        words = [name for name in ("k", "ridge", "rank") if getattr(self, name) == AUTO]
        made: dict[str, Any] = dict.fromkeys(words)
        if "k" in words:
            made |= {"budget": auto_budget(self.budget)} if self.layers is None else {"k": AUTO}  # is refused
        if "rank" in words:
            made |= {"auto_rank": True}
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def check(self) -> None:
        one_way = (
            "--k and --layers say how many layers to linearize, and so does a budget (--k auto, --max-ppl-ratio, "
            "--max-kl, --min-speedup, --max-weight-bytes, --max-kv-bytes): give one of them; a bound on the loss of "
            "K layers is a gate of `nbl-export verify`."
        )
        refuse((self.layers is not None and str(self.k) == AUTO, one_way))
        super().check()
        named, k = self.layers or (), self.k
        overlapping = (
            (one, other) for one, other in combinations(named, 2) if {*parts_in(one)} & {*parts_in(other)}
        )
        other, one = next(overlapping, (None, None))
        refuse(
            (
                k is None and self.layers is None and not self.budget,
                "Say how many layers to linearize: --k K, --k auto, or a budget (--max-ppl-ratio, --max-kl, "
                "--min-speedup, --max-weight-bytes, --max-kv-bytes); or name them with --layers.",
            ),
            (self.budget and (k is not None or self.layers is not None), one_way),
            (
                k is not None and self.layers is not None and k != len(named),
                f"--k {k} and --layers with {len(named)} layers contradict each other: give one.",
            ),
            (len({*named}) < len(named), "--layers names a layer twice: name each layer once."),
            (one is not None, f"--layers names {one} and {other}, which overlap: leave one of them out."),
            (
                self.budget.max_kv_bytes and not self.workload,
                "--max-kv-bytes bounds the KV cache of a workload: say which, as --workload decode=128@4096,batch=4.",
            ),
            (
                named and self.workload,
                "--layers names the layers, and --workload chooses them: give one of them.",
            ),
            (
                self.repair and self.fit == "drop",
                "--fit drop leaves layers out, and there is nothing to repair: leave --repair out.",
            ),
        )

    def resolve(self, task: Task) -> SelectSettings:
        if task.causal:
            return replace(self, criterion=self.criterion or choices.DECODER_CRITERION)
        asked = {
            f"--criterion {self.criterion}": choices.CRITERIA.get(self.criterion or "", False),
            f"--fit {self.fit}": self.fit not in ("lmmse", "drop"),
            "--ridge auto": self.ridge is None,
            "--repair": self.repair > 0,
            "A budget for K": bool(self.budget),
            "--workload": bool(self.workload),
        }
        rest = (
            f" is measured by what a decoder predicts; this model is an encoder ({task.name}): choose layers by --k "
            "with --criterion cca or nmse, or by --layers."
        )
        refuse(*((given, name + rest) for name, given in asked.items()))
        return replace(self, criterion=self.criterion or choices.ENCODER_CRITERION)

    @property
    def reads_graph(self) -> bool:
        """Whether the unmodified graph is needed: layers are then weighed by its speed or its size."""
        return self.budget.min_speedup is not None or self.budget.bounds_size or bool(self.workload)

    @property
    def sees_synthetic(self) -> bool:
        """Whether layers are chosen by synthetic rows, too."""
        return self.synthetic and self.criterion in ("greedy", "kl") and self.layers is None

    @property
    def truncates(self) -> bool:
        """Whether W becomes two factors."""
        return self.rank is not None or self.auto_rank

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """What the model is used for; empty where that does not matter."""
        return tuple(filter(None, map(workload_of, self.workload)))

    def check_precision(self, precision: str | None) -> None:
        """Refuse a repair of the MLPs for a graph whose weights are quantized: it does not hold them as they are."""
        if self.repair and self.repair_rank and precision in choices.QUANTIZED:
            raise InputError(
                f"--repair changes the MLPs' weights, which an {precision} graph does not hold as the model has them: "
                "add --repair-rank 0, which repairs the linear layers alone."
            )
