"""mlx-lm as a :class:`~nbl_export.runtime.stream.Stream`: each row has a cache of its own, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, F32
from nbl_export.errors import BuildError, MissingDependencyError, first_line
from nbl_export.parts import missing
from nbl_export.runtime.decoder import KV

PACKAGE = "mlx-lm"


def is_here() -> bool:
    """Whether mlx-lm is installed and loads."""
    try:
        require_mlx()
    except MissingDependencyError:
        return False
    return True


def require_mlx() -> tuple[Any, Any]:
    """The array library and what loads a folder; raises :class:`MissingDependencyError` without them."""
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ImportError:
        raise missing(PACKAGE, "Running an MLX folder") from None
    return mx, load_model


class MlxStream:
    """The folder at ``path`` on the CPU.

    Raises :class:`BuildError` for a folder that mlx-lm does not load.
    """

    def __init__(self, path: Path) -> None:
        self._mx, load_model = require_mlx()
        self._mx.set_default_device(self._mx.cpu)
        try:
            self._model, config = load_model(path)
        except Exception as error:  # its own code may raise anything
            raise BuildError(f"mlx-lm does not load {path}: {first_line(error)[:300]}.") from error
        states = [block["attention"] for block in config["block_configs"]]
        # A layer with a matrix has a place for a cache, too, which it leaves empty.
        places = [n for n, state in enumerate(states) if not state.get("no_op")]
        self._kept = [at for at, n in enumerate(places) if "n_heads_in_group" in states[n]]
        self.kv_layers = tuple(places[at] for at in self._kept)
        self._caches: list[list[Any]] = []

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._caches = [self._model.make_cache() for _ in rows]
        return np.concatenate([self._read(n, row) for n, row in enumerate(rows)])

    def decode(self, tokens: Sequence[int]) -> F32:
        return np.concatenate([self._read(n, [token]) for n, token in enumerate(tokens)])

    def _read(self, row: int, tokens: Sequence[int] | NDArray[Any]) -> F32:
        ids = self._mx.array(np.asarray(tokens, np.int32))[None]
        logits = self._model(ids, cache=self._caches[row])[0].astype(self._mx.float32)
        self._mx.eval(logits)
        return np.array(logits)

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        lengths = np.array([cache[self._kept[0]].offset if self._kept else 0 for cache in self._caches])
        longest = int(lengths.max(initial=0))
        found = [
            tuple(
                np.concatenate([self._slots(getattr(cache[at], name), longest) for cache in self._caches])
                for name in ("keys", "values")
            )
            for at in self._kept
        ]
        return found, np.arange(longest)[None] < lengths[:, None]

    def _slots(self, side: Any, longest: int) -> F32:
        """One row's keys or values [1, heads, longest, head_dim], with zeros where it is shorter."""
        own = np.array(side.astype(self._mx.float32))[:, :, :longest]
        return np.pad(own, ((0, 0), (0, 0), (0, longest - own.shape[2]), (0, 0)))

    @property
    def cached(self) -> int:
        """The layers that have any keys and values after a prefill."""
        return sum(one.offset > 0 for one in self._caches[0])

    def reserve(self, tokens: int) -> None:
        return None
