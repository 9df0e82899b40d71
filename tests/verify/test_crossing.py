"""Text that is longer than what a model knows a length of: a graph without what begins there does not pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.batch import MASK, TOKENS, batch_of_rows
from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.probe import probe_inputs, probe_model
from nbl_export.calibrate.text import CalibrationText
from nbl_export.export.forms import FORMS, encoder_form
from nbl_export.export.torch import export_torch
from nbl_export.graph.summary import OnCopy
from nbl_export.linearize.lmmse import fit_lmmse
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.models.folder import FEATURES, task_named
from nbl_export.models.lengths import Crossed, Length
from nbl_export.progress import Silent
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.settings import VerifySettings
from nbl_export.verify import case as crossing
from nbl_export.verify import measure as module
from nbl_export.verify.case import DecoderCase, EncoderCase, Measurement, crossing_check, parity_text
from nbl_export.verify.measure import decoder_parity, measure_encoder
from tests.conftest import exhaustive
from tests.families import Calibrated
from tests.fixtures_graph import tensors_of
from tests.tiny_types import BEYOND, ENCODERS, SWITCH, VOCAB

STEPS, LAYER = 8, 1
ROWS = np.random.default_rng(5).integers(3, VOCAB - 5, (12, 160)).astype(np.int32)
TEXT = CalibrationText(
    calibration=ROWS[:4],
    heldout=ROWS[4:8],
    selection=ROWS[8:],
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
        short = ROWS[:8, :48]
        plan = Calibrated(other, collect_moments(other, short), probe_model(other, short)).plan((LAYER,))
        base, linear = folder / "base" / "model.onnx", folder / "linear" / "model.onnx"
        base.parent.mkdir()
        export_torch(other, base, form=FORMS[form])
        rewrite_file(base, plan, linear)
        settings = VerifySettings(decode_steps=STEPS, quality=False, speed=False)
        tensors = tensors_of(base, plan)
        return DecoderCase(model, plan, base, linear, settings, Silent(), TEXT, tensors=tensors)

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
    section = decoder_parity(case(name, False, form), found)
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
    decoder_parity(wrong, found)
    assert found.checks[0].status == "failed"
    assert found.divergence == (
        f"only the rows that cross {BEYOND[name].key} {SWITCH} differ: what begins there is not in the graph as it is "
        "in the model"
    )
    monkeypatch.setattr(crossing, "crossed_by", lambda *_: ())
    short = Measurement()
    decoder_parity(wrong, short)
    assert [c.status for c in short.checks] == ["passed"]


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
    _, found = parity_text(replace(case("phi3", False, "static"), copies=copies), True)
    assert [one.said for one in found] == [said]
    (check,) = crossing_check(found)
    assert check.status == ("skipped" if "not crossed" in said else "passed") and check.detail == said


ENCODER_LAYER, TASK = 1, task_named(FEATURES)


TOKEN_ROWS = np.random.default_rng(5).integers(3, VOCAB, (16, 150))


EncoderMade = Callable[[str, bool], EncoderCase]


def tokens(name: str) -> int:
    return 2 * SWITCH if name == "modernbert" else SWITCH


@pytest.fixture(scope="module")
def encoder_case(tmp_path_factory: pytest.TempPathFactory) -> EncoderMade:
    """An encoder, and the graphs of it, or of one in which nothing begins."""

    @cache
    def made(name: str, off: bool) -> EncoderCase:
        folder: Path = tmp_path_factory.mktemp(name)
        model, other = ENCODERS[name].model(), ENCODERS[name].model(off)
        short = TOKEN_ROWS[:, :40].astype(np.int32)
        probe = probe_inputs(other, batch_of_rows([{TOKENS: TOKEN_ROWS[:1, :n]} for n in (24, 16)]))
        fit = fit_lmmse(collect_moments(other, short).layers[ENCODER_LAYER], "normed")
        plan = Plan(
            model="of a test",
            hidden_size=other.config.hidden_size,
            layer_count=2,
            fit_input="normed",
            criterion="by hand",
            ridge=1e-6,
            calibration_tokens=short.size,
            layers={ENCODER_LAYER: LinearLayer(fit.w.astype(np.float32), fit.b.astype(np.float32))},
            probe=probe.inputs,
            probe_u=probe.x,
            probe_y=probe.y,
        )
        base, linear = folder / "base" / "model.onnx", folder / "linear" / "model.onnx"
        base.parent.mkdir()
        export_torch(
            other, base, form=encoder_form(other, TASK, None, {TOKENS: TOKEN_ROWS, MASK: TOKEN_ROWS})
        )
        rewrite_file(base, plan, linear)
        settings = VerifySettings(quality=False, speed=False)
        heldout = [{TOKENS: row[None, :40]} for row in TOKEN_ROWS[:4]]
        asked = (settings, Silent(), TASK, None, heldout, "documents", 1)
        return EncoderCase(model, plan, base, linear, *asked, tensors=tensors_of(base, plan))

    return made


@pytest.mark.parametrize(
    "name", [n if n == "modernbert" else pytest.param(n, marks=exhaustive) for n in ENCODERS]
)
def test_an_encoder_that_has_it_passes(encoder_case: EncoderMade, name: str) -> None:
    found = measure_encoder(encoder_case(name, False))
    checks = {check.name: check for check in found.checks}
    assert checks["parity"].status == checks["lengths"].status == "passed", found.checks
    assert checks["lengths"].detail == f"{ENCODERS[name].key} {tokens(name)}: crossed by the rows"
    (one,) = found.parity.crossings  # type: ignore[union-attr]
    assert one.prompts == (tokens(name) + 8,)


@pytest.mark.parametrize(
    "name", [n if n == "deberta" else pytest.param(n, marks=exhaustive) for n in ENCODERS]
)
def test_an_encoder_without_it_is_refused(
    encoder_case: EncoderMade, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = encoder_case(name, True)
    found = measure_encoder(wrong)
    assert found.checks[0].status == "failed"
    assert found.divergence is not None
    assert found.divergence.startswith(
        f"only the rows that cross {ENCODERS[name].key} {tokens(name)} differ: "
    )
    monkeypatch.setattr(module, "crossing_batches", lambda *_: ([], ()))
    assert measure_encoder(wrong).checks[0].status == "passed"
