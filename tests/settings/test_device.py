"""The setting of the device: what can be asked, and that it identifies nothing that is made."""

from __future__ import annotations

from typing import Any

import pytest

from nbl_export import settings
from nbl_export.errors import InputError
from nbl_export.settings.definition import OnDevice, settings_of
from nbl_export.settings.file import TABLES

STAGES = ("calibrate", "select", "verify", "eval")


def asked(table: str, device: str) -> Any:
    more: dict[str, Any] = {"k": 1} if table == "select" else {}
    return TABLES[table](device=device, **more)


@pytest.mark.parametrize("table", STAGES)
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:9", "xpu"])
def test_a_device_can_be_asked_of_every_stage_that_runs_the_model(table: str, device: str) -> None:
    found = asked(table, device)
    found.check()
    assert found.device == device
    assert [one.key for one in settings_of(TABLES[table])].count("device") == 1


@pytest.mark.parametrize("table", STAGES[:1])
@pytest.mark.parametrize(
    "device", ["gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cpu:0", "cuda:0,1", "cuda:99999"]
)
def test_what_is_no_device_is_refused(table: str, device: str) -> None:
    with pytest.raises(
        InputError, match=rf"^--device is '{device}'; it must be auto, cpu, cuda, cuda:N .* xpu\.$"
    ):
        asked(table, device).check()


def test_a_device_without_float64_is_refused_and_why() -> None:
    with pytest.raises(InputError, match=r"^--device is mps: an Apple GPU has no float64, .* say cpu"):
        settings.CalibrateSettings(device="mps").check()


@pytest.mark.parametrize("table", STAGES)
def test_a_device_does_not_identify_what_is_made(table: str) -> None:
    plain, other = asked(table, "auto"), asked(table, "cuda")
    assert (
        isinstance(plain, OnDevice) and plain.as_json() == other.as_json() and "device" not in plain.as_json()
    )
