"""The device that PyTorch runs a model on: a setting of every stage that runs one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nbl_export.settings.definition import AUTO, MORE, Must, Settings, setting

_FORM = re.compile(r"auto|cpu|xpu|cuda(:\d{1,4})?")
_NO_MPS = Must(
    lambda device: device != "mps",
    "is mps: an Apple GPU has no float64, in which moments are summed; say cpu, or leave it out",
)
_KNOWN = Must(
    lambda device: _FORM.fullmatch(device) is not None,
    "is {value!r}; it must be auto, cpu, cuda, cuda:N (as cuda:1) or xpu",
)


@dataclass(frozen=True, kw_only=True)
class OnDevice(Settings):
    """What is asked of a stage that runs the model.

    device: Where the model runs, and the graphs if ONNX Runtime has CUDA: cpu, cuda, cuda:N, xpu. auto: a GPU if
        there is one.
    """

    device: str = setting(AUTO, MORE, _NO_MPS, _KNOWN, metavar="DEVICE")

    def as_json(self) -> dict[str, Any]:
        """Without the device: what was made on one is used on machines that have another, or none.

        Sums on a GPU differ in their last bits, so the record of a stage says where it ran; but they are no other
        result, which everything made of them would have to follow.
        """
        return {name: value for name, value in super().as_json().items() if name != "device"}
