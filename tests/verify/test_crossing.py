"""Text that is longer than what a model knows a length of: a graph without what begins there does not pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.probe import probe_model
from nbl_export.calibrate.text import CalibrationText
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import export_torch
from nbl_export.graph.summary import OnCopy
from nbl_export.models.lengths import Crossed, Length
from nbl_export.progress import Silent
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.torch import torch_stream
from nbl_export.settings import VerifySettings
from nbl_export.verify import case as crossing
from nbl_export.verify.case import DecoderCase, crossing_check, parity_text
from nbl_export.verify.decoder import measure_parity
from nbl_export.verify.measurement import Measurement
from tests.beyond import BEYOND, SWITCH, VOCAB
from tests.exhaustive import exhaustive
from tests.families import Calibrated

STEPS, LAYER = 8, 1
TOKENS = np.random.default_rng(5).integers(3, VOCAB - 5, (12, 160)).astype(np.int32)
TEXT = CalibrationText(
    calibration=TOKENS[:4],
    heldout=TOKENS[4:8],
    selection=TOKENS[8:],
    heldout_document=np.arange(4),
    selection_document=np.arange(4),
    start=np.array([2], dtype=np.int32),
)
USUAL = (("gemma3", "concat"), ("phi3", "static"))
Case = Callable[[str, bool, str], DecoderCase]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model, and the graphs of it, or of one in which nothing begins."""

    @cache
    def made(name: str, off: bool, form: str) -> DecoderCase:
        folder = tmp_path_factory.mktemp(name)
        model, other = BEYOND[name].model(), BEYOND[name].model(off)
        short = TOKENS[:8, :48]
        plan = Calibrated(other, collect_moments(other, short), probe_model(other, short)).plan((LAYER,))
        base, linear = folder / "base" / "model.onnx", folder / "linear" / "model.onnx"
        base.parent.mkdir()
        export_torch(other, base, form=FORMS[form])
        rewrite_file(base, plan, linear)
        settings = VerifySettings(decode_steps=STEPS, quality=False, speed=False)
        return DecoderCase(model, plan, base, linear, settings, Silent(), TEXT)

    return made


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (n, f) if (n, f) in USUAL else pytest.param(n, f, marks=exhaustive)
        for n in BEYOND
        for f in ("concat", "static")
    ],
)
def test_a_graph_that_has_it_passes(case: Case, name: str, form: str) -> None:
    found = Measurement()
    section = measure_parity(case(name, False, form), found)
    assert found.checks[0].status == "passed", found.checks[0].detail
    assert [(c.name, c.status) for c in found.checks[1:]] == [("lengths", "passed")]
    assert found.checks[1].detail == f"{BEYOND[name].key} {SWITCH}: crossed by the rows"
    assert section.prompt_lengths == (65, 42, 24)
    (one,) = section.crossings
    # Longer than the length, and decoded across it.
    assert one.prompts == (SWITCH + 8, SWITCH - STEPS // 2)
    # The last 64 logits of each beside those of the ragged rows.
    assert [s.tokens for s in section.steps] == [65 + 42 + 24 + 2 * 64, *[5] * STEPS]


@pytest.mark.parametrize("name", [n if n == "phi3" else pytest.param(n, marks=exhaustive) for n in BEYOND])
def test_a_graph_without_it_is_refused_and_short_text_would_not_see_it(
    case: Case, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong, found = case(name, True, "concat"), Measurement()
    measure_parity(wrong, found)
    assert found.checks[0].status == "failed"
    assert found.divergence == (
        f"only the rows that cross {BEYOND[name].key} {SWITCH} differ: what begins there is not in the graph as it is "
        "in the model"
    )
    monkeypatch.setattr(crossing, "crossed_by", lambda *_: ())
    short = Measurement()
    measure_parity(wrong, short)
    assert [c.status for c in short.checks] == ["passed"]


@pytest.mark.parametrize("name", ["ministral3", "phi3"])
def test_decoding_across_alone_sees_it_too(case: Case, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def across(*arguments: Any) -> tuple[Crossed, ...]:
        return tuple(replace(one, prompts=one.prompts[1:]) for one in original(*arguments))

    original = crossing.crossed_by
    monkeypatch.setattr(crossing, "crossed_by", across)
    found = Measurement()
    measure_parity(case(name, True, "concat"), found)
    assert found.checks[0].status == "failed"


@pytest.mark.parametrize("form", ["concat", "static"])
def test_the_longest_row_of_a_batch_decides_for_all_in_long_rope(case: Case, form: str) -> None:
    """By transformers' own rule, in PyTorch as in the graph: a short row beside a long one is another row."""
    right = case("phi3", False, form)
    long, short = TOKENS[0, :120], TOKENS[1, :30]
    streams = torch_stream(right.model), ort_stream(right.baseline, 130)
    beside = [stream.prefill([long, short])[120:] for stream in streams]
    alone = [stream.prefill([short]) for stream in streams]
    for found in (beside, alone):
        assert np.abs(found[0] - found[1]).max() < 1e-3
    assert np.abs(beside[0] - alone[0]).max() > 0.1


def test_a_plain_model_has_the_text_it_always_had(stories_model: torch.nn.Module, case: Case) -> None:
    plain = replace(case("mistral", False, "concat"), model=stories_model)
    rows, alone, crossings = parity_text(plain, True)
    assert (alone, crossings) == ([], ())
    assert [len(row) for row in rows] == [65 + STEPS, 42 + STEPS, 24 + STEPS]
    assert crossing_check(crossings) == ()


@pytest.mark.parametrize(
    ("crossed", "copies", "said"),
    [
        ({"prompts": (108, 96)}, (), "w 100: crossed by the rows"),
        ({"why": "long"}, (OnCopy("w", 100, 16),), "w 100: crossed on a copy with 16"),
        ({"why": "long"}, (OnCopy("w", 100, why="no"),), "w 100: not crossed: no"),
        ({"why": "long"}, (OnCopy("other", 100, 16),), "w 100: not crossed: long"),
        ({"why": "50 positions", "reached": False}, (), "w 100: never reached (50 positions)"),
    ],
)
def test_what_is_said_of_a_length(
    case: Case, monkeypatch: pytest.MonkeyPatch, crossed: Any, copies: Any, said: str
) -> None:
    monkeypatch.setattr(crossing, "crossed_by", lambda *_: (Crossed(Length("w", 100, (0,)), **crossed),))
    _, _, found = parity_text(replace(case("mistral", False, "concat"), copies=copies), True)
    assert [one.said for one in found] == [said]
    (check,) = crossing_check(found)
    assert check.status == ("skipped" if "not crossed" in said else "passed") and check.detail == said
