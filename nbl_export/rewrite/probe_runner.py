"""Run a graph on the plan's probe: from its inputs, or from activations that are fed to a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch import PIXELS, TOKENS, rows_of_batch
from nbl_export.graph.rounding import nudge, nudged_values
from nbl_export.linearize.plan import Plan
from nbl_export.rewrite.routers import load_routed, tell, told_ranks
from nbl_export.runtime.intermediates import Arrays, compute_tensors, prefill_rows, unbatched

# Tensors by name, of each row.
Found = list[Arrays]


class ProbeRunner:
    """Runs the graph at ``path`` on the probe of ``plan``; ``progress`` receives the bytes of weights that were run."""

    def __init__(
        self, path: Path, plan: Plan, progress: Callable[[int], object] = lambda _bytes: None
    ) -> None:
        self.path, self.plan, self.progress = path, plan, progress
        self.rows = rows_of_batch(plan.probe)
        of_image = len(next(iter(plan.probe_y.values()))) // len(self.rows)
        self.lengths = [row[TOKENS].shape[1] if TOKENS in row else of_image for row in self.rows]

    def run(
        self,
        names: Sequence[str],
        given: Mapping[str, Sequence[NDArray[Any]]],
        nudged: int | None = None,
        other_tokens: bool = False,
    ) -> Found:
        """Tensors ``names`` for each row; the intermediate tensors ``given`` are fed instead of computed.

        ``nudged``, a seed, moves the graph's weights, and what is fed, as rounding moves them. ``other_tokens`` runs
        each row backwards: what depends on the fed tensors alone does not change. Routers are told what PyTorch's
        have chosen, if the plan says it. ``given`` has an array for each row, in the shapes of :meth:`split`.
        Returns for each row its tensors by name, in the graph's shapes, half precision as float32. Raises
        :class:`~nbl_export.errors.InputError` if onnxruntime does not run the graph.
        """
        model = load_routed(self.path)
        rows = [_backwards(row) for row in self.rows] if other_tokens else self.rows
        feeds: list[Arrays] = prefill_rows(model, rows)
        dtypes = {v.name: v.dtype for node in model.graph for v in node.outputs}
        for name, arrays in given.items():
            for number, (feed, array) in enumerate(zip(feeds, arrays, strict=True)):
                moved = nudged is not None
                feed[name] = nudged_values(array, dtypes.get(name), [nudged, number]) if moved else array  # type: ignore[list-item]
        if nudged is not None:
            nudge(model, nudged)
        routes = self.plan.probe_routes
        if ranks := told_ranks(model, routes):
            tell(model)
            for (name, rank), number in zip(ranks.items(), sorted(routes), strict=True):
                for feed, part in zip(feeds, self._parts(routes[number]), strict=True):
                    feed[name] = part if rank == part.ndim else part[None]
        return compute_tensors(model, names, feeds, progress=self.progress)

    def _parts(self, whole: NDArray[Any]) -> list[NDArray[Any]]:
        return np.split(whole, np.cumsum(self.lengths)[:-1])

    def split(
        self, activations: NDArray[np.float32], shapes: Sequence[tuple[int, ...]]
    ) -> list[NDArray[np.float32]]:
        """``activations`` [unpadded tokens, d] row by row, in ``shapes``."""
        return [p.reshape(s) for p, s in zip(self._parts(activations), shapes, strict=True)]

    def joined(self, arrays: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
        """The rows of one tensor as [unpadded tokens, d]."""
        return np.concatenate(self._unbatched(arrays)).astype(np.float32)

    def error(self, arrays: Sequence[NDArray[Any]], expected: NDArray[np.float32]) -> float:
        """The relative error of a tensor against ``expected`` [unpadded tokens, d]; infinite for another shape."""
        alike = {row.shape[1:] for row in self._unbatched(arrays)} == {expected.shape[1:]}
        return relative_error(self.joined(arrays), expected) if alike else float("inf")

    def _unbatched(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        return [unbatched(a, length) for a, length in zip(arrays, self.lengths, strict=True)]


def _backwards(row: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: a[..., ::-1].copy() if name in (TOKENS, PIXELS) else a for name, a in row.items()}


def relative_error(found: NDArray[Any], expected: NDArray[np.float32]) -> float:
    """‖found - expected‖ / ‖expected‖, both [tokens, d], of all tokens or of the median token, whichever is larger.

    Infinite for NaN, infinity or another shape. Two tensors of zeros are equal.
    """
    if found.shape != expected.shape:
        return float("inf")
    with np.errstate(
        invalid="ignore", over="ignore"
    ):  # infinity minus infinity, which counts as infinite below
        difference = np.linalg.norm(found.astype(np.float64) - expected, axis=-1)
        norms = np.linalg.norm(expected.astype(np.float64), axis=-1)
        if not (np.isfinite(difference).all() and np.isfinite(norms).all()):
            return float("inf")
        whole = float(np.linalg.norm(difference) / (np.linalg.norm(norms) or 1.0))
        each = difference / np.where(norms == 0, np.linalg.norm(norms) / len(norms) ** 0.5 or 1.0, norms)
        return max(whole, float(np.median(each)))
