"""Parity on texts with images: what is right passes, and what has other embeddings or positions does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nbl_export.batch.media_ids import FIRST
from nbl_export.export.embeds import embedding_form, reading_embeds
from nbl_export.export.forms import FORMS
from nbl_export.export.ranges import ranges_of
from nbl_export.export.torch import export_torch
from nbl_export.graph.embedding import NAME
from nbl_export.graph.io import load_graph
from nbl_export.models.media_tokens import MediaTokens
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.verify.parity import media as module
from nbl_export.verify.parity.figures import gates_for
from nbl_export.verify.parity.media import media_parity, rows_with_media
from tests.exhaustive import exhaustive
from tests.families import WIDTH, Calibrated


def of_two_by_two() -> MediaTokens:
    """Two images of 2 x 2, seen in both directions."""
    features = np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32) * 0.3
    offsets = np.tile([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]], (2, 1)).astype(np.int32)
    steps = np.tile([0, 0, 0, 2], 2).astype(np.int32)
    return MediaTokens(
        features=features,
        later=np.zeros((8, 0, WIDTH), np.float32),
        offsets=offsets,
        steps=steps,
        block=np.repeat([0, 1], 4).astype(np.int32),
        stand_in=np.zeros(8, np.int32),
        both_ways=np.ones(1, np.int32),
    )


def test_rows_go_on_after_their_first_image() -> None:
    heldout = np.arange(3 * 90, dtype=np.int32).reshape(3, 90) % 200
    heldout[1, 20:24] = heldout[1, 50:54] = FIRST + np.arange(4)
    heldout[2, 86:90] = FIRST + np.arange(4)
    assert [len(row) for row in rows_with_media(heldout)] == [24 + 32, 90]
    assert rows_with_media(heldout[:1]) == []


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("qwen2.5-vl", "static"),
        pytest.param("gemma3", "shared", marks=exhaustive),
        pytest.param("gemma4", "concat", marks=exhaustive),
    ],
)
def test_right_and_wrong(
    name: str,
    form: str,
    wrapper: Callable[[str], Calibrated],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, images = wrapper(name), of_two_by_two()
    if name != "qwen2.5-vl":
        images = replace(images, offsets=images.offsets[:, :1] * 0, steps=images.steps * 0 + 1)
    export_torch(case.model, tmp_path / NAME, form=embedding_form(case.model))
    baseline, graph = tmp_path / "baseline" / "model.onnx", tmp_path / "model.onnx"
    export_torch(case.model, baseline, form=reading_embeds(FORMS[form], case.model))
    plan = case.plan((2,))
    rewrite_file(baseline, plan, graph)
    rows = [np.random.default_rng(i).integers(3, 250, 30).astype(np.int32) for i in range(2)]
    rows[0][5:9], rows[1][12:16] = FIRST + np.arange(4), FIRST + 4 + np.arange(4)
    gates = gates_for("float32")
    assert media_parity(case.model, plan, graph, rows, images, gates).failures() == []
    assert media_parity(case.model, plan, baseline, rows, images, gates).failures()

    plain = module._by_graph
    wrong = {"features": images.features + 1e-2}
    if name.startswith("qwen"):
        wrong["offsets"] = images.offsets * 0
        wrong["steps"] = images.steps + 1
    if name == "gemma4":
        wrong["stand_in"] = images.stand_in + 5
    for field, value in wrong.items():
        other = replace(images, **{field: value})
        monkeypatch.setattr(module, "_by_graph", lambda d, r, _i, other=other: plain(d, r, other))
        assert media_parity(case.model, plan, graph, rows, images, gates).failures(), field

    # The ranges for half precision are of images, too.
    images = replace(images, features=images.features * 1e4)
    ranges = [
        ranges_of(load_graph(baseline), given)
        for given in ([rows[0][:5]], [rows[0][:5], images.given(rows[0], case.model)])
    ]
    assert ranges[1].keys() == ranges[0].keys() and all(v >= ranges[0][k] for k, v in ranges[1].items())
    assert max(ranges[1].values()) > 100 * max(ranges[0].values())
