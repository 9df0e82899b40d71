"""The machine's best rates: what work is done, in which time, and which repetition counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from nbl_export.runtime.session import CPU
from nbl_export.verify.speed import roofline as module
from nbl_export.verify.speed.roofline import cpu_machine, measure_roofline


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


@pytest.mark.usefixtures("small")
def test_the_product_of_onnxruntime_is_really_computed() -> None:
    (found,) = module._ort_product()()  # type: ignore[misc]
    square = np.random.default_rng(0).random((8, 8), dtype=np.float32).astype(np.float64)
    np.testing.assert_allclose(found, square @ square, rtol=1e-5)


@pytest.mark.usefixtures("small")
def test_the_machine_is_the_one_that_graphs_run_on() -> None:
    machine = cpu_machine()
    assert machine.device == CPU and machine.threads and machine.compute_capability is None
    assert machine.roofline and machine.roofline.device == "cpu"
