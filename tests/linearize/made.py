"""Plans and changes of weights made of random numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import F64
from nbl_export.linearize.plan import Adapter, LinearLayer, Plan, weight_digests

D, COUNT = 6, 5


def make_plan(seed: int = 0, layers: tuple[int, ...] = (1, 4)) -> Plan:
    """A plan of no real model: ``layers`` of COUNT, of width D."""
    rng = np.random.default_rng(seed)

    def real(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return Plan(
        model="a" * 64,
        hidden_size=D,
        layer_count=COUNT,
        fit_input="normed",
        criterion="cca",
        ridge=1e-6,
        calibration_tokens=1234,
        layers={i: LinearLayer(real(D, D), real(D)) for i in layers},
        probe={
            "input_ids": rng.integers(0, 50, (2, 4)),
            "attention_mask": np.array([[1, 1, 1, 1], [0, 1, 1, 1]]),
            "position_ids": np.array([[0, 1, 2, 3], [0, 0, 1, 2]]),
        },
        probe_u={i: real(7, D) for i in range(COUNT)},
        probe_y={i: real(7, D) for i in range(COUNT)},
    )


def adapter_for(weight: NDArray[Any], rank: int = 3, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    m, n = weight.shape
    up, down = (rng.normal(size=shape).astype(np.float32) for shape in ((m, rank), (rank, n)))
    return Adapter(up, down, weight_digests(weight))


def random_maps(*layers: int, d: int = 32) -> dict[int, LinearLayer]:
    """Maps about as strong as the attention they replace."""
    rng = np.random.default_rng(1)
    return {
        i: LinearLayer(rng.normal(size=(d, d)).astype(np.float32) / 4, rng.normal(size=d).astype(np.float32))
        for i in layers
    }


def least_squares(u: F64, y: F64, weight: F64 | None = None) -> tuple[F64, F64]:
    """W and b by least squares on the rows, each times the root of its weight, with an intercept column."""
    root = np.sqrt(np.ones(len(u)) if weight is None else weight)[:, None]
    solution = np.linalg.lstsq(np.column_stack([u, np.ones(len(u))]) * root, y * root, rcond=None)[0]
    return solution[:-1].T, solution[-1]
