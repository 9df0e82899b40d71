"""Every stage on the GPU of this machine: the tests of :mod:`tests.end_to_end.test_virtual_device`, for real."""

from __future__ import annotations

import pytest
import torch

from tests.on_device import *  # noqa: F403

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", 0)
