"""mlx-lm as a :class:`~nbl_export.runtime.stream.Stream`: each row has a cache of its own, on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32
from nbl_export.errors import BuildError, first_line
from nbl_export.packages import missing
from nbl_export.runtime.stream import RowStream

PACKAGE = "mlx-lm"


def require_mlx() -> tuple[Any, Any]:
    """The array library and what loads a folder; raises :class:`MissingDependencyError` without them."""
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ImportError:
        raise missing(PACKAGE, "Running an MLX folder") from None
    return mx, load_model


class MlxStream(RowStream):
    """The folder at ``path`` on the CPU. Of its tensors' names the parts in ``renamed`` are others in mlx-lm.

    Raises :class:`BuildError` for a folder that mlx-lm does not load.
    """

    def __init__(self, path: Path, renamed: Mapping[str, str] | None = None) -> None:
        self._mx, load_model = require_mlx()
        self._mx.set_default_device(self._mx.cpu)
        try:
            self._model, config = load_model(path, **_reading(renamed or {}))
        except Exception as error:  # its own code may raise anything
            raise BuildError(f"mlx-lm does not load {path}: {first_line(error)[:300]}.") from error
        states = [block["attention"] for block in config["block_configs"]]
        # A layer with a matrix has a place for a cache, too, which it leaves empty.
        places = [n for n, state in enumerate(states) if not state.get("no_op")]
        self._kept = [at for at, n in enumerate(places) if "n_heads_in_group" in states[n]]
        self.kv_layers = tuple(places[at] for at in self._kept)

    def _empty(self) -> Any:
        return self._model.make_cache()

    def _logits(self, tokens: NDArray[Any], cache: Any) -> F32:
        ids = self._mx.array(tokens.astype(np.int32))[None]
        logits = self._model(ids, cache=cache)[0].astype(self._mx.float32)
        self._mx.eval(logits)
        return np.array(logits)

    def _length(self, cache: Any) -> int:
        return int(cache[self._kept[0]].offset) if self._kept else 0

    def _sides(self, cache: Any, number: int) -> tuple[F32, F32]:
        own, length = cache[self._kept[number]], self._length(cache)
        keys, values = (np.array(t.astype(self._mx.float32))[:, :, :length] for t in (own.keys, own.values))
        return keys, values

    @property
    def cached(self) -> int:
        """The layers that have any keys and values after a prefill."""
        return sum(one.offset > 0 for one in self._caches[0])


def _reading(renamed: Mapping[str, str]) -> dict[str, Any]:
    """What has ``load_model`` rename tensors."""
    if not renamed:
        return {}

    def classes(config: Mapping[str, Any]) -> tuple[Any, Any]:
        module: Any = importlib.import_module(f"mlx_lm.models.{config['model_type']}")

        class Renamed(module.Model):  # type: ignore[misc,name-defined]  # of a module found by its name
            def sanitize(self, weights: Mapping[str, Any]) -> Any:
                return super().sanitize({_name(key, renamed): value for key, value in weights.items()})

        return Renamed, module.ModelArgs

    return {"get_model_classes": classes}


def _name(key: str, renamed: Mapping[str, str]) -> str:
    for other, own in renamed.items():
        key = key.replace(other, own)
    return key
