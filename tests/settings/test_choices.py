"""Who exports what: refused before any work, with what would be possible."""

from __future__ import annotations

from typing import Any

import pytest

from nbl_export import api
from nbl_export.errors import InputError


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
    ],
)
def test_what_an_exporter_does_not_offer_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        api.ExportSettings(**settings).check()
    assert said in str(caught.value) and "\n" not in str(caught.value)
