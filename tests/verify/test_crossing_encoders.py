"""Rows of an encoder that are longer than its lengths: a graph without what begins there does not pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.batch.names import MASK, TOKENS
from nbl_export.batch.rows import batch_of_rows
from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.probe import probe_inputs
from nbl_export.export.forms import encoder_form
from nbl_export.export.torch import export_torch
from nbl_export.linearize.lmmse import fit_lmmse
from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.models.tasks import FEATURES, task_named
from nbl_export.progress import Silent
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.settings import VerifySettings
from nbl_export.verify import encoder as module
from nbl_export.verify.case import EncoderCase
from nbl_export.verify.encoder import measure_encoder
from tests.beyond import ENCODERS, SWITCH, VOCAB
from tests.exhaustive import exhaustive

LAYER, TASK = 1, task_named(FEATURES)


TOKEN_ROWS = np.random.default_rng(5).integers(3, VOCAB, (16, 150))


Case = Callable[[str, bool], EncoderCase]


def tokens(name: str) -> int:
    return 2 * SWITCH if name == "modernbert" else SWITCH


def form_of(model: torch.nn.Module) -> Any:
    return encoder_form(model, TASK, None, {TOKENS: TOKEN_ROWS, MASK: TOKEN_ROWS})


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """An encoder, and the graphs of it, or of one in which nothing begins."""

    @cache
    def made(name: str, off: bool) -> EncoderCase:
        folder: Path = tmp_path_factory.mktemp(name)
        model, other = ENCODERS[name].model(), ENCODERS[name].model(off)
        short = TOKEN_ROWS[:, :40].astype(np.int32)
        probe = probe_inputs(other, batch_of_rows([{TOKENS: TOKEN_ROWS[:1, :n]} for n in (24, 16)]))
        fit = fit_lmmse(collect_moments(other, short).layers[LAYER], "normed")
        plan = Plan(
            model="of a test",
            hidden_size=other.config.hidden_size,
            layer_count=2,
            fit_input="normed",
            criterion="by hand",
            ridge=1e-6,
            calibration_tokens=short.size,
            layers={LAYER: LinearLayer(fit.w.astype(np.float32), fit.b.astype(np.float32))},
            probe=probe.inputs,
            probe_u=probe.x,
            probe_y=probe.y,
        )
        base, linear = folder / "base" / "model.onnx", folder / "linear" / "model.onnx"
        base.parent.mkdir()
        export_torch(other, base, form=form_of(other))
        rewrite_file(base, plan, linear)
        settings = VerifySettings(quality=False, speed=False)
        heldout = [{TOKENS: row[None, :40]} for row in TOKEN_ROWS[:4]]
        return EncoderCase(model, plan, base, linear, settings, Silent(), TASK, None, heldout, "documents", 1)

    return made


@pytest.mark.parametrize(
    "name", [n if n == "modernbert" else pytest.param(n, marks=exhaustive) for n in ENCODERS]
)
def test_a_graph_that_has_it_passes(case: Case, name: str) -> None:
    found = measure_encoder(case(name, False))
    checks = {check.name: check for check in found.checks}
    assert checks["parity"].status == checks["lengths"].status == "passed", found.checks
    assert checks["lengths"].detail == f"{ENCODERS[name].key} {tokens(name)}: crossed by the rows"
    (one,) = found.parity.crossings  # type: ignore[union-attr]
    assert one.prompts == (tokens(name) + 8,)


@pytest.mark.parametrize(
    "name", [n if n == "deberta" else pytest.param(n, marks=exhaustive) for n in ENCODERS]
)
def test_a_graph_without_it_is_refused_and_short_text_would_not_see_it(
    case: Case, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = case(name, True)
    found = measure_encoder(wrong)
    assert found.checks[0].status == "failed"
    assert found.divergence is not None
    assert found.divergence.startswith(
        f"only the rows that cross {ENCODERS[name].key} {tokens(name)} differ: "
    )
    monkeypatch.setattr(module, "crossing_batches", lambda *_: ([], ()))
    assert measure_encoder(wrong).checks[0].status == "passed"
