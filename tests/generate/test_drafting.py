"""What a draft brings is counted from what was kept; a token that the graph would not take is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nbl_export.errors import BuildError, InputError
from nbl_export.generate import drafting
from tests.listening import Notes

OWN = [5, 6, 7, 8, 9, 10]
KEPT = {"rounds": 2, "draft_tokens_evaluated": 6, "draft_tokens_accepted": 4, "tokens_queued": 6}


class Scripted:
    """In the place of onnxruntime-genai: a folder generates what is scripted for it."""

    def __init__(self, tokens: dict[str, list[int]], counts: dict[str, int]) -> None:
        self.tokens, self.counts = tokens, counts
        self.loaded: list[str] = []

    def Model(self, folder: str) -> str:
        self.loaded.append(Path(folder).name)
        return Path(folder).name

    def GeneratorParams(self, _model: str) -> Any:
        return SimpleNamespace(set_search_options=lambda **_: None)

    def Generator(self, model: str, _parameters: Any) -> Any:
        left = list(self.tokens[model])
        taken: list[int] = []
        counts = self.counts if model == "drafted" else dict.fromkeys(self.counts, 0)
        return SimpleNamespace(
            append_tokens=lambda tokens: None,
            is_done=lambda: not left,
            generate_next_token=lambda: taken.append(left.pop(0)),
            get_next_tokens=lambda: taken[-1:],
            get_speculative_stats=lambda: counts,
        )


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    made = Scripted({"alone": OWN, "drafted": list(OWN)}, dict(KEPT))
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", made)
    return made


def measure(proposed: int = 3, cost: float = 0.25, near_tie: float = 1e-3) -> drafting.Drafting:
    return drafting.measure(Path("alone"), Path("drafted"), [[1, 2], [3]], proposed, cost, near_tie, Notes())


def test_what_a_draft_brings_is_counted(scripted: Scripted) -> None:
    found = measure()
    assert (found.prompts, found.tokens, found.proposed) == (2, 12, 3)
    assert found.acceptance == pytest.approx(8 / 12) and found.tokens_per_round == pytest.approx(12 / 4)
    assert found.expected == pytest.approx(3 / (1 + 3 * 0.25))
    assert found.speedup.least > 0 and np.isfinite(found.speedup.most)
    # In turns, each loaded anew.
    assert scripted.loaded == ["alone", "drafted"] * drafting.ROUNDS


@pytest.mark.parametrize(("proposed", "cost", "pays"), [(3, 0.66, True), (3, 0.67, False), (2, 0.99, True)])
def test_a_round_that_costs_more_than_its_tokens_cannot_pay(
    scripted: Scripted, proposed: int, cost: float, pays: bool
) -> None:
    if pays:
        assert measure(proposed, cost).expected > 1
        return
    with pytest.raises(InputError, match=r"3\.00 tokens come of a round that costs 3\.01 passes .* 67% kept"):
        measure(proposed, cost)
    assert scripted.loaded == ["alone", "drafted"]  # it is known after one round


class Row:
    """The graph alone, for which two tokens are ``apart``."""

    apart = 0.0

    def __init__(self, graph: Path) -> None:
        assert graph == Path("alone/model.onnx")

    def begin(self, tokens: list[int], room: int) -> Any:
        assert tokens == [1, 2, 5, 6] and room == 5
        logits = np.zeros(100)
        logits[7], logits[70] = 3.0, 3.0 - self.apart
        return logits


@pytest.mark.parametrize(
    ("apart", "near_tie", "right"), [(5e-4, 1e-3, True), (0.1, 1e-3, False), (0.1, 0.5, True)]
)
def test_another_token_is_refused_unless_it_is_as_good(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch, apart: float, near_tie: float, right: bool
) -> None:
    scripted.tokens["drafted"] = [5, 6, 70, 71, 72, 73]
    monkeypatch.setattr(drafting, "GenaiRow", Row)
    monkeypatch.setattr(Row, "apart", apart)
    calls = {"prompts": [[1, 2]]}

    def found() -> drafting.Drafting:
        return drafting.measure(Path("alone"), Path("drafted"), calls["prompts"], 3, 0.25, near_tie, Notes())

    if right:
        assert found().tokens == 6
        return
    with pytest.raises(
        BuildError, match=r"takes another token than the graph alone, whose logit is 0\.1 lower"
    ):
        found()


def test_what_onnxruntime_genai_refuses_is_said(scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_folder: str) -> str:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(scripted, "Model", refuse)
    with pytest.raises(InputError, match=r"does not run alone: no such thing\.$"):
        measure()
