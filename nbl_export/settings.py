"""What a user can ask of each stage, checked before any work begins."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, get_args

from nbl_export.calibrate.text import TextSettings
from nbl_export.errors import InputError
from nbl_export.linearize.budget import AUTO_PERPLEXITY_RATIO, NO_BUDGET, Budget
from nbl_export.linearize.lmmse import DEFAULT_RIDGE, MAX_RIDGE, FitInput, FitName

if TYPE_CHECKING:
    from nbl_export.engine.profiles import Limits
    from nbl_export.evaluate.tasks import TaskSettings

# Calibration has no settings of its own but what text to take.
CalibrateSettings = TextSettings


def auto_budget(budget: Budget) -> Budget:
    """``--k auto``: the bounds that the user gave, or the documented default where none bounds the loss."""
    if budget.bounds_loss:
        return budget
    return replace(budget, max_perplexity_ratio=AUTO_PERPLEXITY_RATIO)


# What measures best (docs/selection.md); the paper's criterion is cca.
DECODER_CRITERION, ENCODER_CRITERION = "greedy", "cca"
REPAIR_RANK = 16


@dataclass(frozen=True)
class SelectSettings:
    """Which layers: the ``k`` best by ``criterion``, as many as ``budget`` allows, or exactly ``layers``; how fitted.

    ``criterion`` None is what suits the task. ``ridge`` None is chosen by held-out error. ``repair`` is the number of
    steps of distillation, drawn by ``seed``, and ``repair_rank`` that of the changes it may make to the MLPs.
    ``rank`` is that of the maps, in the end, None for whole ones.
    """

    k: int | None = None
    layers: tuple[int, ...] | None = None
    criterion: str | None = None
    fit_input: FitInput = "normed"
    ridge: float | None = DEFAULT_RIDGE
    fit: FitName = "lmmse"
    repair: int = 0
    repair_rank: int = REPAIR_RANK
    rank: int | None = None
    seed: int = 0
    budget: Budget = NO_BUDGET

    def check(self) -> None:
        from nbl_export.linearize.scores import check_criterion, check_k, check_rank

        ways = [self.k is not None, self.layers is not None, bool(self.budget)]
        if not any(ways):
            raise InputError(
                "Say how many layers to linearize: --k K, --k auto, or a budget (--max-ppl-ratio, --max-kl, "
                "--min-speedup); or name them with --layers."
            )
        if self.budget and sum(ways) > 1:
            raise InputError(
                "--k and --layers say how many layers to linearize, and so does a budget (--k auto, --max-ppl-ratio, "
                "--max-kl, --min-speedup): give one of them."
            )
        self.budget.check()
        if self.k is not None:
            check_k(self.k, None)
        if self.criterion is not None:
            check_criterion(self.criterion)
        for option, value, known in (
            ("--fit-input", self.fit_input, get_args(FitInput)),
            ("--fit", self.fit, get_args(FitName)),
        ):
            if value not in known:
                raise InputError(f"{option} {value!r} is unknown; choose one of {', '.join(known)}.")
        if self.ridge is not None and not 0 <= self.ridge <= MAX_RIDGE:
            raise InputError(f"--ridge is {self.ridge:g}; it must be between 0 and {MAX_RIDGE:g}, or auto.")
        if self.repair < 0:
            raise InputError(f"--repair is {self.repair}; it must be 0 steps or more.")
        if self.repair_rank < 0:
            raise InputError(f"--repair-rank is {self.repair_rank}; it must be 0 (the maps alone) or more.")
        if self.rank is not None:
            check_rank(self.rank, None)
        if self.repair and self.fit == "drop":
            raise InputError(
                "--fit drop leaves layers out, and there is nothing to repair: leave --repair out."
            )

    def for_task(self, task: str) -> SelectSettings:
        """The settings with the criterion that a model of ``task`` is chosen by.

        Raises :class:`InputError` for what only a decoder can be measured by.
        """
        from nbl_export.linearize.scores import check_criterion
        from nbl_export.models.tasks import task_named

        if task_named(task).causal:
            return replace(self, criterion=self.criterion or DECODER_CRITERION)
        asked = {
            f"--criterion {self.criterion}": bool(
                self.criterion and check_criterion(self.criterion).measured
            ),
            f"--fit {self.fit}": self.fit not in ("lmmse", "drop"),
            "--ridge auto": self.ridge is None,
            "--repair": self.repair > 0,
            "A budget for K": bool(self.budget),
        }
        if wrong := next((name for name, given in asked.items() if given), None):
            raise InputError(
                f"{wrong} is measured by what a decoder predicts; this model is an encoder ({task}): choose layers by "
                "--k with --criterion cca or nmse, or by --layers."
            )
        return replace(self, criterion=self.criterion or ENCODER_CRITERION)

    def check_precision(self, precision: str) -> None:
        """Refuse a repair of the MLPs for a graph whose weights are quantized: it does not hold them as they are."""
        from nbl_export.graph.precision import QUANTIZED

        if self.repair and self.repair_rank and precision in QUANTIZED:
            raise InputError(
                f"--repair changes the MLPs' weights, which an {precision} graph does not hold as the model has them: "
                "add --repair-rank 0, which repairs the linear layers alone."
            )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ExportSettings:
    """Who exports the graph, its precision, and how it keeps its KV cache; None is what suits the task.

    ``python`` runs an exporter that cannot live beside this package (optimum); none is looked for.
    """

    precision: str = "fp32"
    kv_cache: str | None = None
    exporter: str = "torch"
    python: str | None = None

    def check(self) -> None:
        from nbl_export.export.choices import check_choice, choices_of

        choices = choices_of(self.exporter)
        check_choice(self.exporter, "--precision", self.precision, choices.precisions)
        if self.kv_cache is not None:
            check_choice(self.exporter, "--kv-cache", self.kv_cache, choices.caches)
        if self.exporter == "genai":
            from nbl_export.export.genai import require_genai

            require_genai()
        if self.exporter == "optimum":
            from nbl_export.export.optimum import find_optimum

            find_optimum(self.python)

    def for_task(self, task: str, engines: bool = False) -> ExportSettings:
        """The settings with the form of cache that a model of ``task`` has; ``engines`` are faster with a static one.

        Raises :class:`InputError` for what an encoder cannot have.
        """
        from nbl_export.export.choices import choices_of
        from nbl_export.models.tasks import task_named

        caches = choices_of(self.exporter).caches
        if task_named(task).causal:
            static = "static" if engines and "static" in caches else None
            return replace(self, kv_cache=self.kv_cache or static or caches[0])
        if self.exporter != "torch":
            raise InputError(
                f"--exporter {self.exporter} is for decoders here; this model is an encoder ({task}): leave it out."
            )
        if self.kv_cache not in (None, "none"):
            raise InputError(
                f"An encoder ({task}) has no KV cache, so --kv-cache {self.kv_cache} means nothing: leave it out."
            )
        if engines:
            raise InputError(
                f"TensorRT engines are built of decoders only; this model is an encoder ({task}): leave --trt out."
            )
        return replace(self, kv_cache="none")

    def check_tensorrt(self) -> None:
        """Raise :class:`InputError` if TensorRT does not take the graphs that these settings make."""
        from nbl_export.export.choices import choices_of

        choices = choices_of(self.exporter)
        if (self.kv_cache or choices.caches[0]) in choices.fused:
            whose = (
                f"--exporter {self.exporter}" if self.exporter != "torch" else f"--kv-cache {self.kv_cache}"
            )
            raise InputError(
                f"TensorRT does not take the graphs of {whose}: their operators, such as GroupQueryAttention, are "
                "onnxruntime's own. Build engines with --exporter torch and --kv-cache static or concat."
            )


@dataclass(frozen=True)
class EngineSettings:
    """Which TensorRT builds the engines, for which shapes and which GPUs.

    ``sm`` are compute capabilities to build for ahead of time; none means all that the library knows
    from 8.0 on. ``max_seq`` and ``max_context`` default to 512 and 2,048 tokens as far as the model goes.
    """

    library: str = "auto"
    max_batch: int = 4
    max_seq: int | None = None
    max_context: int | None = None
    sm: tuple[str, ...] = ()

    def check(self) -> None:
        from nbl_export.engine.gpu import find_gpu
        from nbl_export.engine.library import check_capabilities, choose_library

        self.limits(None)
        check_capabilities(choose_library(self.library, find_gpu()), self.sm)

    def limits(self, model_context: int | None) -> Limits:
        """The shapes to build for, held to the model's number of positions where that is known."""
        from nbl_export.engine.profiles import limits

        return limits(self.max_batch, self.max_seq, self.max_context, model_context)


@dataclass(frozen=True)
class VerifySettings:
    """What to verify: decode steps of the parity run, and the optional quality and speed sections.

    ``contexts`` longer than the model's positions are left out, with a note.
    """

    decode_steps: int = 8
    quality: bool = True
    speed: bool = True
    contexts: tuple[int, ...] = (128, 512, 1024)
    rounds: int = 7

    def check(self) -> None:
        if self.decode_steps < 1:
            raise InputError(f"--decode-steps is {self.decode_steps}; it must be at least 1.")
        if self.rounds < 3:
            raise InputError(f"--rounds is {self.rounds}; at least 3 are needed for a spread.")
        if any(c < 2 for c in self.contexts) or not self.contexts:
            raise InputError("--contexts needs lengths of at least 2 tokens.")


PEERS = ("eager", "compile", "dropped")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class BenchSettings:
    """What is timed beside base and linearized graph, in which cells, and for how long.

    ``against`` are folders, [NAME=]DIR; ``peers`` of :data:`PEERS` are made from the model itself. At least ``rounds``
    rounds a cell and phase, up to ``most`` times as many where the noise hides the effect, within ``seconds`` (three
    rounds are always run). ``memory``: also measure peak memory, each graph in a process of its own.
    """

    against: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 4)
    contexts: tuple[int, ...] = (128, 512, 2048, 8192)
    rounds: int = 7
    most: int = 3
    seconds: float = 120.0
    device: str = "cpu"
    memory: bool = True

    def check(self) -> None:
        for option, given, known in (("--peer", self.peers, PEERS), ("--device", (self.device,), DEVICES)):
            if unknown := [name for name in given if name not in known]:
                raise InputError(f"{option} {unknown[0]!r} is unknown; choose one of {', '.join(known)}.")
        if self.rounds < 3:
            raise InputError(f"--rounds is {self.rounds}; at least 3 are needed for a spread.")
        if any(c < 2 for c in self.contexts) or not self.contexts:
            raise InputError("--contexts needs lengths of at least 2 tokens.")
        if any(b < 1 for b in self.batches) or not self.batches:
            raise InputError("--batches needs numbers of rows, at least 1.")
        if not self.seconds > 0:
            raise InputError(f"--seconds is {self.seconds:g}; it must be more than 0.")


@dataclass(frozen=True)
class EvalSettings:
    """Which tasks are asked of both graphs, how many rows of each, and what must be left of the scores.

    ``tasks`` are local .jsonl files, folders of them, or names of lm-evaluation-harness; ``limit`` rows of each
    are sampled with ``seed``, None for all. ``few_shot`` None is none for local tasks and the task's own for
    others. ``retrieval_contexts`` None is the usual lengths as far as the model has positions.
    ``min_recovery``, in percent, is a gate.
    """

    tasks: tuple[str, ...] = ()
    limit: int | None = None
    few_shot: int | None = None
    seed: int = 0
    chat_template: bool = False
    batch_size: int = 16
    retrieval: bool = True
    retrieval_contexts: tuple[int, ...] | None = None
    retrieval_samples: int = 24
    min_recovery: float | None = None

    def check(self) -> None:
        if not self.tasks and not self.retrieval:
            raise InputError("Nothing to evaluate: name --tasks, or leave out --no-retrieval.")
        for name, least in (("limit", 1), ("few_shot", 0), ("batch_size", 1), ("retrieval_samples", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}.")
        if any(c < 2 for c in self.retrieval_contexts or ()):
            raise InputError("--retrieval-contexts needs lengths of at least 2 tokens.")
        if self.min_recovery is not None and not 0 <= self.min_recovery <= 200:
            raise InputError(f"--min-recovery is {self.min_recovery:g}; give percent, between 0 and 200.")

    @property
    def of_tasks(self) -> TaskSettings:
        """What is asked of each task."""
        from nbl_export.evaluate.tasks import TaskSettings

        return TaskSettings(self.limit, self.few_shot, self.seed, self.chat_template)
