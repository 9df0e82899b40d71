"""What `convert` can be asked."""

from __future__ import annotations

import pytest

from nbl_export import api
from nbl_export.errors import InputError
from nbl_export.models.tasks import task_named


@pytest.mark.parametrize(
    "to, precision, able, choices",
    [
        *(
            (to, bits, "gguf", "fp32 or fp16")
            for to in ("mlx", "hf", "openvino", "decilm")
            for bits in ("q8_0", "q4_k_m")
        ),
        (
            "openvino",
            "bf16",
            "gguf or mlx or hf or decilm",
            "fp32 or fp16, and quantize with the engine's own",
        ),
    ],
)
def test_a_precision_that_the_form_cannot_have(to: str, precision: str, able: str, choices: str) -> None:
    with pytest.raises(
        InputError, match=f"--precision {precision} is of --to {able}, not of --to {to}: choose {choices}"
    ):
        api.ConvertSettings(to, precision).check()  # type: ignore[arg-type]


def test_an_encoder_has_no_such_form() -> None:
    with pytest.raises(InputError, match="--to gguf is for decoders; this model is an encoder"):
        api.ConvertSettings().resolve(task_named("feature-extraction"))
    assert api.ConvertSettings().resolve(task_named("text-generation")) == api.ConvertSettings()
