"""The machine's best rates: what work is done, in which time, and which repetition counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nbl_export.verify.speed import roofline as module
from nbl_export.verify.speed.roofline import measure_roofline


def test_the_machine_is_measured() -> None:
    found = measure_roofline()
    assert (found.device, found.dtype) == ("cpu", "float32") and found.threads
    # A wrist watch and a supercomputer: what lies outside was counted in other units.
    assert 1e8 < found.macs_per_second < 1e14 and 1e8 < found.bytes_per_second < 1e14


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays that take no time."""
    monkeypatch.setattr(module, "_STREAM", 1000)
    monkeypatch.setattr(module, "_PRODUCT", 8)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "best",
    [(2.0, 1.0, 4.0, 5.0), (6.0, 1.0, 4.0, 5.0), (2.0, 1.0, 9.0, 5.0)],
    ids=["triad and PyTorch", "sum", "onnxruntime"],
)
def test_the_best_repetition_of_the_fastest_counts(
    monkeypatch: pytest.MonkeyPatch, best: tuple[float, ...]
) -> None:
    """A triad moves three arrays of 1000 float32, a sum one; a product of 8 × 8 is 8³ multiply-adds."""
    triad, read, torch_product, ort_product = best
    seconds = iter([one * factor for one in best for factor in (3, 2, 2, 1, 2, 2, 2)])

    def told(work: Callable[[], object]) -> float:
        work()
        return next(seconds)

    monkeypatch.setattr(module, "timed", told)
    found = measure_roofline()
    assert next(seconds, None) is None
    assert found.bytes_per_second == max(12000 / triad, 4000 / read)
    assert found.macs_per_second == 512 / min(torch_product, ort_product)
    assert found.threads == torch.get_num_threads()
