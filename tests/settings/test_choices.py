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
    ],
)
def test_what_an_exporter_does_not_offer_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        api.ExportSettings(**settings).check()
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_are_what_the_exporter_offers_first() -> None:
    def chosen(engines: bool, **asked: Any) -> tuple[str | None, str | None]:
        settings = api.ExportSettings(**asked).resolve(task_named("text-generation"), engines)
        return settings.precision, settings.kv_cache

    assert chosen(False, exporter="torch") == ("fp32", "concat")
    assert chosen(True, exporter="torch") == ("fp16", "static")
    assert chosen(True, exporter="optimum") == ("fp32", "concat")
    assert chosen(False, exporter="genai", precision="int4") == ("int4", "concat")


@pytest.mark.parametrize(
    ("settings", "whose"),
    [({"exporter": "genai"}, "--exporter genai"), ({"kv_cache": "shared"}, "--kv-cache shared")],
)
def test_engines_of_graphs_that_tensorrt_does_not_take(
    tmp_path: Any, tiny_folder: Any, settings: dict[str, str], whose: str
) -> None:
    with pytest.raises(
        InputError, match=rf"TensorRT does not take the graphs of {whose}: .*GroupQuery.*static or concat\.$"
    ):
        api.run(
            tiny_folder,
            tmp_path / "out",
            api.SelectSettings(k=1),
            exporting=api.ExportSettings(**settings),
            engines=api.EngineSettings("rtx"),
        )
    assert not (tmp_path / "out").exists()
