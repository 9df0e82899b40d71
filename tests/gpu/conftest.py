"""Tests in this folder run engines: without an NVIDIA GPU and a CUDA build of torch they are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nbl_export.engine.library import find_gpu

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if find_gpu() is None:
        reason = "needs an NVIDIA GPU"
    elif not torch.cuda.is_available():
        reason = "needs an NVIDIA GPU that torch sees: install a CUDA build of torch"
    else:
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
