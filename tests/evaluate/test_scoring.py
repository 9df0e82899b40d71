"""Log-likelihoods and greedy answers of every form of graph are those of PyTorch, however rows are batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.evaluate import scoring
from nbl_export.evaluate.scoring import Limits, Pair, Scored, greedy, log_likelihoods
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import export_torch
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.stream import Stream
from tests.exporters import GRAPH, Graphs
from tests.fixtures_graph import load

FAMILY, VOCAB = "llama-gqa", 260
RAGGED = ("ours-shared", "genai-fp32")
EXTENDING = ("ours-concat", "ours-static", *RAGGED)
FLOAT = (*EXTENDING, "whole")


@pytest.fixture(scope="module")
def model(model_of: Callable[[str], Path]) -> Any:
    loaded: Any = load(model_of(FAMILY))
    loaded.generation_config.eos_token_id = None  # answers are as long as asked
    return loaded


@pytest.fixture(scope="module")
def path_of(graphs: Graphs, model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny Llama in a form of graph; ``whole`` keeps no cache."""
    whole = tmp_path_factory.mktemp("whole") / GRAPH

    def path(form: str) -> Path:
        if form != "whole":
            return graphs(form, FAMILY) / GRAPH
        if not whole.exists():
            export_torch(model, whole, form=FORMS["none"])
        return whole

    return path


def random_tokens(rng: np.random.Generator, length: int) -> tuple[int, ...]:
    return tuple(int(t) for t in rng.integers(3, VOCAB, length))


def pairs_of_all_kinds() -> list[Pair]:
    """Contexts asked once and several times, continuations of one and of many tokens, repeated and empty ones."""
    rng = np.random.default_rng(0)
    pairs = []
    for context_length, lengths in (
        (1, (3,)),
        (9, (1, 1, 1, 1)),
        (30, (4, 1, 9, 2)),
        (17, (5,)),
        (31, (2, 2)),
        (3, (12, 1, 11)),
        (25, (0, 6)),
    ):
        context = random_tokens(rng, context_length)
        pairs += [Pair(context, random_tokens(rng, n)) for n in lengths]
    return [*pairs, pairs[6], pairs[3]]


def expected(model: Any, pair: Pair) -> Scored:
    """From PyTorch's logits of the row alone, by a float64 log-softmax."""
    if not pair.continuation:
        return Scored(0.0, True)
    row = torch.tensor([[*pair.context, *pair.continuation]])
    with torch.inference_mode():
        logits = model(input_ids=row[:, :-1]).logits[0, len(pair.context) - 1 :].double()
    targets = torch.tensor(pair.continuation)
    values = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None])
    return Scored(float(values.sum()), bool((logits.argmax(-1) == targets).all()))


def assert_same(found: Sequence[Scored], wanted: Sequence[Scored], atol: float = 1e-3) -> None:
    np.testing.assert_allclose(
        [s.log_likelihood for s in found], [s.log_likelihood for s in wanted], rtol=0, atol=atol
    )
    assert [s.greedy for s in found] == [s.greedy for s in wanted]


@pytest.mark.parametrize("form", FLOAT)
def test_log_likelihoods_are_pytorchs(path_of: Callable[[str], Path], model: Any, form: str) -> None:
    pairs, done = pairs_of_all_kinds(), []
    stream = ort_stream(path_of(form), 64)
    found = log_likelihoods(stream, pairs, Limits(64, VOCAB, 3), done.append)
    assert_same(found, [expected(model, pair) for pair in pairs])
    assert sum(done) == len(pairs)


def test_what_is_too_long_loses_its_beginning(path_of: Callable[[str], Path], model: Any) -> None:
    rng = np.random.default_rng(2)
    context, continuation = random_tokens(rng, 40), random_tokens(rng, 8)
    # 16 positions hold 9 tokens of context and 7 of 8; a continuation of 40 is scored at its end.
    pairs = [Pair(context, continuation), Pair(continuation, context)]
    kept = [Pair(context[-9:], continuation), Pair(context[23:24], context[24:])]
    found = log_likelihoods(ort_stream(path_of("ours-concat"), 16), pairs, Limits(16, VOCAB))
    assert_same(found, [expected(model, pair) for pair in kept])


@pytest.mark.parametrize("form", ["ours-concat", "genai-fp32"])
def test_a_long_row_is_read_in_parts(
    path_of: Callable[[str], Path], model: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 1)  # 64 tokens at once, the least
    rng = np.random.default_rng(3)
    pairs = [
        Pair(context, random_tokens(rng, n))
        for context in (random_tokens(rng, 200), random_tokens(rng, 64))
        for n in (3, 1)
    ]
    stream = Counting(ort_stream(path_of(form), 256))
    found = log_likelihoods(stream, pairs, Limits(256, VOCAB))
    assert_same(found, [expected(model, pair) for pair in pairs])
    assert max(stream.passes) <= 64


class Counting(Stream):
    """A stream that notes how many tokens, padding included, each pass reads."""

    extends = True

    def __init__(self, stream: Any) -> None:
        self.stream, self.passes = stream, []

    def _note(self, rows: Sequence[Any]) -> None:
        self.passes.append(len(rows) * max(map(len, rows)))

    def prefill(self, rows: Sequence[Any]) -> Any:
        self._note(rows)
        return self.stream.prefill(rows)

    def reserve(self, tokens: int) -> None:
        self.stream.reserve(tokens)

    def decode(self, tokens: Sequence[int]) -> Any:
        self.passes.append(len(tokens))
        return self.stream.decode(tokens)

    def extend(self, owners: Sequence[int], rows: Sequence[Any]) -> Any:
        self._note(rows)
        return self.stream.extend(owners, rows)

    def fork(self) -> Counting:
        twin = Counting(self.stream.fork())
        twin.passes = self.passes
        return twin


def test_a_context_is_read_once_for_all_its_continuations(path_of: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(4)
    context = random_tokens(rng, 100)
    stream = Counting(ort_stream(path_of("ours-concat"), 256))
    log_likelihoods(stream, [Pair(context, random_tokens(rng, 5)) for _ in range(4)], Limits(256, VOCAB))
    assert stream.passes == [100, 4 * 4]
    letters = Counting(ort_stream(path_of("ours-concat"), 256))
    log_likelihoods(letters, [Pair(context, (token,)) for token in range(4, 8)], Limits(256, VOCAB))
    assert letters.passes == [100]


def transformers_greedy(model: Any, prompt: Sequence[int], most: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=0
        )
    return [int(t) for t in out[0, len(prompt) :]]


@pytest.mark.parametrize("form", [*EXTENDING, "whole"])
def test_greedy_answers_are_transformers(
    path_of: Callable[[str], Path], model: Any, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of more than 64 tokens is read in parts, and decoded from there on."""
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 1)
    rng = np.random.default_rng(7)
    prompts = [(1, *random_tokens(rng, n)) for n in (11, 3, 24, 6, 90)]
    found = greedy(ort_stream(path_of(form), 128), prompts, 12, lambda _i, _t: False, Limits(128, VOCAB, 2))
    assert found == [transformers_greedy(model, p, 12) for p in prompts]


def test_an_answer_ends_where_it_is_finished(path_of: Callable[[str], Path], model: Any) -> None:
    rng = np.random.default_rng(8)
    prompts = [(1, *random_tokens(rng, n)) for n in (5, 9, 7)]
    enough = (2, 5, 1)
    done: list[int] = []
    found = greedy(
        ort_stream(path_of("ours-concat"), 64),
        prompts,
        8,
        lambda i, tokens: len(tokens) == enough[i],
        Limits(64, VOCAB),
        done.append,
    )
    wanted = [transformers_greedy(model, p, 8)[:n] for p, n in zip(prompts, enough, strict=True)]
    assert found == wanted and sum(done) == 3
    long = [tuple(random_tokens(rng, 40))]
    found = greedy(ort_stream(path_of("ours-concat"), 16), long, 4, lambda *_: False, Limits(16, VOCAB))
    assert found == [transformers_greedy(model, long[0][-12:], 4)]
