"""Who exports what: refused before any work, with what would be possible."""

from __future__ import annotations

from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.models.tasks import task_named


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"exporter": "tensorflow"}, "'tensorflow' is unknown; choose torch, genai, optimum"),
        (
            {"precision": "int4"},
            "not offered by --exporter torch: choose fp32, fp16, bf16; int4 is for --exporter genai",
        ),
        ({"exporter": "optimum", "precision": "fp16"}, "choose fp32; fp16 is for --exporter torch or genai"),
        ({"exporter": "genai", "kv_cache": "static"}, "choose concat; static is for --exporter torch"),
        ({"precision": "fp8"}, "choose fp32, fp16, bf16."),
        (
            {"exporter": "genai", "opset": 18},
            "--opset is for --exporter torch; genai chooses its own: leave one",
        ),
    ],
)
def test_what_an_exporter_does_not_offer_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        api.ExportSettings(**settings).check()
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cache", "opset", "said"),
    [
        ("concat", 18, None),
        ("none", 22, None),
        ("concat", 23, None),
        ("static", 24, None),
        ("concat", 17, "--opset is 17; graphs with --kv-cache concat are of opsets 18 to 23."),
        ("concat", 24, "--opset is 24; graphs with --kv-cache concat are of opsets 18 to 23."),
        (
            "static",
            18,
            "--opset is 18; graphs with --kv-cache static are of opset 24; concat and none go with older ones.",
        ),
        (
            "shared",
            22,
            "--opset is 22; graphs with --kv-cache shared are of opset 23; concat and none go with older ones.",
        ),
        ("shared", 24, "--opset is 24; graphs with --kv-cache shared are of opset 23."),
    ],
)
def test_an_opset_that_a_cache_does_not_have_is_refused(cache: str, opset: int, said: str | None) -> None:
    asked = api.ExportSettings(opset=opset, kv_cache=cache)
    if said is None:
        assert asked.resolve(task_named("text-generation")).opset == opset
        return
    with pytest.raises(InputError) as caught:
        asked.resolve(task_named("text-generation"))
    assert str(caught.value) == said
