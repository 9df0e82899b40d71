"""The rates of this machine are measured once in a run, by whichever process is first.

``tests/verify/speed/test_roofline.py`` measures them, and so does a test that has replaced something of that.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch

from nbl_export.files import write_json
from nbl_export.verify.speed import roofline as measuring
from nbl_export.verify.speed.values import Roofline
from tests.kept import kept_in
from tests.replaced import replaced_for

MEASURED = "verify/speed/test_roofline.py"
_measure = measuring.measure_roofline


def install() -> None:
    """Replace what measures; without a folder nothing is kept."""
    measuring.measure_roofline = measure_roofline


def measure_roofline(device: str = "cpu", dtype: str = "float32") -> Roofline:
    """As :func:`nbl_export.verify.speed.roofline.measure_roofline`."""
    folder = kept_in(but=MEASURED)
    if folder is None or replaced_for(measuring.__name__):
        return _measure(device, dtype)
    path = folder / f"{device}-{dtype}-{torch.get_num_threads()}.json"
    if not path.exists():
        write_json(path, asdict(_measure(device, dtype)))
    return Roofline(**json.loads(path.read_text()))
