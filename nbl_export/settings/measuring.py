"""Define the settings of what measures and of what generates text: verify, eval, bench, diff, generate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from cyclopts import Parameter

from nbl_export.settings.choices import DEVICES, PEERS, RETRIEVAL_CONTEXTS
from nbl_export.settings.definition import (
    ANSWERS,
    CHECKS,
    COST,
    MORE,
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
from nbl_export.settings.making import NO_BOUND, LossBound
from nbl_export.workspace import BASE, LINEARIZED

_LENGTHS = Must(lambda c: c and min(c) >= 2, "needs lengths of at least 2 tokens")
_ROWS = Must(lambda b: b and min(b) >= 1, "needs numbers of rows, at least 1")
_ROUNDS = Must(lambda n: n >= 3, "is {value}; at least 3 are needed for a spread")
_PERCENT = Must(lambda p: 0 <= p <= 200, "is {value}; give percent, between 0 and 200")
_POSITIVE = Must(lambda seconds: seconds > 0, "is {value}; it must be more than 0")
_NO_CODE = Must(
    lambda task: not task.lower().endswith((".yaml", ".yml")),
    "names {value}, which may run code: say it on the command line",
    of_file=True,
)


@options
@dataclass(frozen=True)
class VerifySettings(OnDevice):
    """What to verify. Contexts longer than the model's positions are left out, with a note.

    ``bound`` is a gate on the loss, measured on held-out text.

    decode_steps: Teacher-forced decode steps of the parity run.
    quality: Measure the method loss on held-out text.
    speed: Time both graphs.
    contexts: Context lengths to time, in tokens.
    rounds: Timed rounds of base and linearized in turn.
    """

    decode_steps: int = setting(8, MORE, at_least(1))
    quality: bool = setting(True, CHECKS)
    speed: bool = setting(True, CHECKS)
    contexts: tuple[int, ...] = setting((128, 512, 1024), MORE, _LENGTHS)
    rounds: int = setting(7, MORE, _ROUNDS)
    bound: LossBound = NO_BOUND

    def check(self) -> None:
        super().check()
        unmeasured = (
            "--no-quality leaves unmeasured what --max-kl, --max-ppl-ratio, --k auto bound: give one of them."
        )
        refuse((self.bound and not self.quality, unmeasured))

    def resolve(self, task: Task) -> VerifySettings:
        said = (
            f"--max-kl and --max-ppl-ratio bound what a decoder predicts; this model is an encoder ({task.name}), "
            "whose likeness to the original is in the report: leave them out."
        )
        refuse((self.bound and not task.causal, said))
        return self


@options
@dataclass(frozen=True)
class EvalSettings(OnDevice):
    """Which tasks are asked of both graphs, how many rows of each, and which recovery of the scores is a gate.

    tasks: A .jsonl file, a folder of them, or a task of lm-evaluation-harness, whose data comes from the Hub.
        Repeatable.
    limit: Rows of each task, sampled with the seed.
    few_shot: Examples before each question.
    seed: Seed of everything sampled.
    chat_template: Ask in the tokenizer's chat template.
    batch_size: Most rows at once.
    retrieval: Look up codes hidden in held-out text.
    retrieval_contexts: Context lengths of retrieval, in tokens.
    retrieval_samples: Questions at each length.
    min_recovery: Exit 1 where the mean recovery of the scores is below it by more than the standard error.
    """

    of_decoders = "Tasks and retrieval are asked of decoders"
    instead = "its method loss is in the report of `nbl-export verify`"

    tasks: tuple[str, ...] = setting((), CHECKS, _NO_CODE, metavar="NAME|FOLDER|FILE", repeated=True)
    limit: int | None = setting(None, CHECKS, at_least(1), shown="all")
    few_shot: int | None = setting(None, MORE, at_least(0), shown="0; of a named task its own")
    seed: int = setting(0, MORE)
    chat_template: bool = setting(False, MORE)
    batch_size: int = setting(16, MORE, at_least(1))
    retrieval: bool = setting(True, CHECKS)
    retrieval_contexts: tuple[int, ...] | None = setting(
        None, MORE, _LENGTHS, shown=f"{','.join(map(str, RETRIEVAL_CONTEXTS))} as far as the model goes"
    )
    retrieval_samples: int = setting(24, MORE, at_least(1))
    min_recovery: float | None = setting(None, CHECKS, _PERCENT, metavar="PERCENT")

    def check(self) -> None:
        nothing = not self.tasks and not self.retrieval
        refuse((nothing, "Nothing to evaluate: name --tasks, or leave out --no-retrieval."))
        super().check()


@options
@dataclass(frozen=True)
class BenchSettings(Settings):
    """What is timed beside base and linearized graph, in which cells, and for how long.

    ``most`` times the rounds are run where the noise hides the effect.

    against: Another graph: a folder with a decoder, or an output folder for both its graphs. Repeatable.
    peer: PyTorch eager, torch.compile, the graph with the same layers dropped, or OUT's forms for
        llama.cpp or OpenVINO. Repeatable.
    batches: Rows at once.
    contexts: Tokens in each row, as far as the model goes.
    rounds: Timed rounds of everybody in turn; up to three times as many where the noise hides the effect.
    seconds: Bound of each cell and phase. Three rounds are always run.
    device: Where to run.
    memory: Measure peak memory first, each graph in a process of its own.
    anew: Make each session anew in every round: where one lies in memory can cost more than a few layers save.
    """

    of_decoders = "A bench times prefill and decode"
    instead = "its speed is in the report of `nbl-export verify`"

    against: tuple[str, ...] = setting((), CHECKS, metavar="[NAME=]DIR", repeated=True)
    peer: tuple[str, ...] = setting((), CHECKS, one_of(PEERS), metavar="|".join(PEERS), repeated=True)
    batches: tuple[int, ...] = setting((1, 4), CHECKS, _ROWS)
    contexts: tuple[int, ...] = setting((128, 512, 2048, 8192), CHECKS, _LENGTHS)
    rounds: int = setting(7, MORE, _ROUNDS)
    most: Annotated[int, Parameter(parse=False)] = 3
    seconds: float = setting(120.0, MORE, _POSITIVE, metavar="S")
    device: str = setting("cpu", CHECKS, one_of(DEVICES), metavar="|".join(DEVICES))
    memory: bool = setting(True, MORE)
    anew: bool = setting(False, MORE)


_FACTOR = at_least(1, "1 or more (1.05 allows 5 % more)")


@options
@dataclass(frozen=True)
class DiffBounds(Settings):
    """What B may cost beside A, each a factor, and None where the user bounds nothing. B may be at the bound exactly.

    max_ppl_increase: Exit 1 where B's perplexity ratio is more than X times A's.
    max_slowdown: Exit 1 where B is surely slower than A by more than X times, by 95 % intervals.
    max_size_increase: Exit 1 where B's graph and weights are more than X times A's bytes.
    """

    max_ppl_increase: float | None = setting(None, COST, _FACTOR)
    max_slowdown: float | None = setting(None, COST, _FACTOR)
    max_size_increase: float | None = setting(None, COST, _FACTOR)


BOTH = "both"
GRAPHS = (LINEARIZED, BASE, BOTH)
_SHARE = Must(lambda p: 0 < p <= 1, "is {value}; it must be more than 0 and at most 1")


@options
@dataclass(frozen=True)
class GenerateSettings(Settings):
    """How text is generated, and by which graph.

    graph: The graph that generates; with both, one after the other, each under its name.
    max_tokens: Most tokens of an answer.
    temperature: Divides the logits; 0 always takes the likeliest token.
    top_p: Sample from the likeliest tokens that together have this probability.
    seed: Seed of the sampling.
    raw: Continue the text as it is, without the chat template.
    system: The system message of the chat template.
    """

    graph: str = setting(LINEARIZED, ANSWERS, one_of(GRAPHS), metavar="|".join(GRAPHS))
    max_tokens: int = setting(128, ANSWERS, at_least(1))
    temperature: float = setting(0.0, ANSWERS, at_least(0))
    top_p: float = setting(1.0, ANSWERS, _SHARE)
    seed: int = setting(0, ANSWERS, at_least(0))
    raw: bool = setting(False, ANSWERS)
    system: str | None = setting(None, ANSWERS, metavar="TEXT")

    def check(self) -> None:
        super().check()
        both = "--raw uses no chat template, and --system is a part of it: give one of them."
        refuse((self.raw and self.system, both))
