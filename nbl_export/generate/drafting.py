"""A small model that proposes tokens, which the graph then checks several at a time: speculative decoding.

Greedy decoding keeps of a proposal what the graph itself would have chosen, so that the text is the graph's own, and
only its speed changes. A round costs one pass of the graph and one pass of the draft for each proposed token. Passes
of decoding read all weights, so that a pass of the draft costs ``cost``, its weights in units of the graph's, and with
``tokens_per_round`` tokens for each round the graph alone takes

    expected = tokens_per_round / (1 + proposed · cost)

times as long (arXiv 2211.17192, section 3.3). Where that is no more than 1 a draft cannot pay.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbl_export.errors import BuildError, InputError, first_line
from nbl_export.generate.genai import GenaiRow
from nbl_export.progress import Listener
from nbl_export.verify.speed.race import ratio
from nbl_export.verify.speed.values import Ratio

ROUNDS = 6  # the least that an interval of a median needs
NEW_TOKENS = 32


@dataclass(frozen=True)
class Drafting:
    """What a draft that proposes ``proposed`` tokens a round does, over ``tokens`` greedy tokens after ``prompts``.

    ``acceptance`` is the share of the checked proposals that were kept; ``tokens_per_second`` are medians of the rounds
    alone and with the draft, and ``speedup`` is that of pairs of rounds.
    """

    proposed: int
    prompts: int
    tokens: int
    acceptance: float
    tokens_per_round: float
    cost: float
    expected: float
    tokens_per_second: tuple[float, float]
    speedup: Ratio


@dataclass(frozen=True)
class _Pass:
    """The tokens after each prompt, the seconds they took, and the counts of speculative decoding."""

    tokens: tuple[tuple[int, ...], ...]
    seconds: float
    counts: dict[str, int]


def measure(
    alone: Path,
    drafted: Path,
    prompts: Sequence[Sequence[int]],
    proposed: int,
    cost: float,
    near_tie: float,
    listener: Listener,
) -> Drafting:
    """Run the folders ``alone`` and ``drafted``, the same graph without and with a draft, in turns on ``prompts``.

    Each round loads them anew: where a session lies in memory changes its speed. Raises :class:`InputError` if
    onnxruntime-genai refuses a folder, or the draft cannot pay; :class:`BuildError` if it changes a token where the
    graph's two best differ by more than ``near_tie``.
    """
    taken: tuple[list[_Pass], list[_Pass]] = ([], [])
    with listener.task("Decoding with the draft", ROUNDS, "rounds") as task:
        for number in range(ROUNDS):
            for folder, passes in zip((alone, drafted), taken, strict=True):
                passes.append(_decode(folder, prompts))
            if not number:
                _check_tokens(alone, prompts, taken[0][0].tokens, taken[1][0].tokens, near_tie)
                per_round, acceptance = _rates(taken[1][0].counts)
                expected = per_round / (1 + proposed * cost)
                if expected <= 1:
                    raise InputError(
                        f"The draft cannot pay: {per_round:.2f} tokens come of a round that costs "
                        f"{1 + proposed * cost:.2f} passes of the graph ({proposed} proposals of {cost:.2f} each, "
                        f"{acceptance:.0%} kept). Take a smaller draft or one that is nearer, or fewer --draft-tokens."
                    )
            task.advance(1)
    speeds = [[sum(map(len, p.tokens)) / p.seconds for p in passes] for passes in taken]
    # The ratio of seconds for each token: both generate as many, but for near-ties.
    times = [[1 / speed for speed in found] for found in speeds]
    return Drafting(
        proposed,
        len(prompts),
        sum(map(len, taken[1][0].tokens)),
        acceptance,
        per_round,
        cost,
        expected,
        (float(np.median(speeds[0])), float(np.median(speeds[1]))),
        ratio(times[0], times[1]),
    )


def _decode(folder: Path, prompts: Sequence[Sequence[int]]) -> _Pass:
    import onnxruntime_genai as genai

    found, seconds, counts = [], 0.0, dict.fromkeys(("rounds", "draft_tokens_evaluated"), 0)
    counts |= dict.fromkeys(("draft_tokens_accepted", "tokens_queued"), 0)
    try:
        model = genai.Model(str(folder))
        for prompt in prompts:
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(
                max_length=len(prompt) + NEW_TOKENS, do_sample=False, batch_size=1, num_beams=1
            )
            generator = genai.Generator(model, parameters)
            generator.append_tokens(np.array(prompt, dtype=np.int32))
            begun, tokens = time.perf_counter(), []
            while not generator.is_done():
                generator.generate_next_token()
                tokens.append(int(generator.get_next_tokens()[0]))
            seconds += time.perf_counter() - begun
            stats: dict[str, Any] = generator.get_speculative_stats()
            counts = {name: counts[name] + int(stats[name]) for name in counts}
            found.append(tuple(tokens))
            del generator
    except (RuntimeError, ValueError) as error:  # those of onnxruntime-genai
        raise InputError(f"onnxruntime-genai does not run {folder}: {first_line(error)}.") from None
    return _Pass(tuple(found), seconds, counts)


def _rates(counts: dict[str, int]) -> tuple[float, float]:
    """Tokens that came of each round, and the share of the checked proposals that were kept."""
    rounds, checked = max(1, counts["rounds"]), max(1, counts["draft_tokens_evaluated"])
    return counts["tokens_queued"] / rounds, counts["draft_tokens_accepted"] / checked


def _check_tokens(
    alone: Path,
    prompts: Sequence[Sequence[int]],
    own: Sequence[Sequence[int]],
    drafted: Sequence[Sequence[int]],
    near_tie: float,
) -> None:
    """Raise :class:`BuildError` unless both are the same up to where the graph has two best tokens."""
    row: GenaiRow | None = None
    for prompt, a, b in zip(prompts, own, drafted, strict=True):
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if at is None:
            continue
        row = row or GenaiRow(alone / "model.onnx")
        logits = row.begin([*prompt, *a[:at]], len(prompt) + at + 1)
        short = float(logits[a[at]] - logits[b[at]])
        if short > near_tie:
            raise BuildError(
                "With the draft onnxruntime-genai takes another token than the graph alone, whose logit is "
                f"{short:.3g} lower: this is a fault of its speculative decoding; leave --draft out."
            )
