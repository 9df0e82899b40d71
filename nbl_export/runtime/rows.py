"""mlx-lm and transformers as a :class:`.Stream`: each row has a cache of its own, on the CPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, F32
from nbl_export.batch.rows import prefix_mask
from nbl_export.errors import BuildError, first_line
from nbl_export.models.libraries import cache_argument, quiet
from nbl_export.models.registered import register
from nbl_export.packages import missing
from nbl_export.runtime.stream import KV, Stream


class RowStream(Stream):
    """A stream whose runtime takes one row at a time: each has a cache of its own.

    A subclass has ``_empty()``, the cache of a row that has not begun; ``_logits(tokens, cache)`` [tokens, vocab] of
    the next tokens of its row; ``_sides(cache)``, keys and values [1, heads, tokens, head_dim] of each attention that
    has any.
    """

    kv_layers: tuple[int, ...]
    _empty: Callable[[], Any]
    _logits: Callable[[NDArray[Any], Any], F32]
    _sides: Callable[[Any], list[tuple[F32, F32]]]

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._caches = [self._empty() for _ in rows]
        self._lengths = np.zeros(len(rows), dtype=np.int64)
        return self._read(rows)

    def decode(self, tokens: Sequence[int]) -> F32:
        return self._read([np.array([token]) for token in tokens])

    def _read(self, rows: Sequence[NDArray[Any]]) -> F32:
        self._lengths = self._lengths + np.array([len(row) for row in rows])
        read = [self._logits(row, cache) for row, cache in zip(rows, self._caches, strict=True)]
        return np.concatenate(read)

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        slots = int(self._lengths.max()) if self.kv_layers else 0

        def joined(sides: Sequence[F32]) -> F32:
            # Zeros where a row is shorter.
            missing = [((0, 0), (0, 0), (0, slots - side.shape[2]), (0, 0)) for side in sides]
            return np.concatenate(list(map(np.pad, sides, missing)))

        layers = zip(*(self._sides(cache) for cache in self._caches), strict=True)
        found = [tuple(joined(sides) for sides in zip(*rows, strict=True)) for rows in layers]
        return found, prefix_mask(self._lengths, slots)


class TransformersStream(RowStream):
    """The folder at ``path``, loaded as a user does, by classes that :mod:`nbl_export.transformers` registers.

    Each row has transformers' own cache, as it has in `generate`. Raises :class:`BuildError` for a folder that
    transformers does not load whole.
    """

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        register()
        try:
            with quiet():
                model, found = AutoModelForCausalLM.from_pretrained(
                    path, local_files_only=True, output_loading_info=True, dtype="auto"
                )
        except Exception as error:  # its own code may raise anything
            raise BuildError(f"transformers does not load {path}: {first_line(error)[:300]}.") from error
        if odd := sorted({*found["missing_keys"], *found["unexpected_keys"]}):
            raise BuildError(f"transformers does not find every weight of {path}: {odd[0]}.")
        self.model: Any = model.eval()
        nbl = self.model.config.nbl
        linear = {name.split(".")[-2] for name in nbl["modules"] if name.endswith(f".{nbl['attention']}")}
        layers = range(self.model.config.num_hidden_layers)
        self.kv_layers = tuple(i for i in layers if str(i) not in linear)

    def _empty(self) -> Any:
        from transformers import DynamicCache

        # Without a configuration it keeps what is behind a window, too: every key and value can be compared.
        return DynamicCache()

    def _logits(self, tokens: NDArray[Any], cache: Any) -> F32:
        import torch

        ids = torch.tensor(tokens.astype(np.int64))[None]
        with torch.inference_mode():
            given = {cache_argument(self.model): cache}
            logits = self.model(input_ids=ids, use_cache=True, **given).logits[0]
        found: F32 = logits.float().numpy()
        return found

    def _sides(self, cache: Any) -> list[tuple[F32, F32]]:
        kept = [layer for layer in cache.layers if layer.get_seq_length()]
        return [(layer.keys.float().numpy(), layer.values.float().numpy()) for layer in kept]


def require_mlx() -> tuple[Any, Any]:
    """The array library and what loads a folder; raises :class:`MissingDependencyError` without them."""
    try:
        import mlx.core as mx
        from mlx_lm.utils import load_model
    except ImportError:
        raise missing("mlx-lm", "Running an MLX folder") from None
    return mx, load_model


class MlxStream(RowStream):
    """The folder at ``path`` on the CPU. Of its tensors' names the parts in ``renamed`` are others in mlx-lm.

    Raises :class:`BuildError` for a folder that mlx-lm does not load.
    """

    def __init__(self, path: Path, renamed: Mapping[str, str] | None = None) -> None:
        self._mx, load_model = require_mlx()
        self._mx.set_default_device(self._mx.cpu)
        classes = {"get_model_classes": lambda config: _renaming(config, renamed)} if renamed else {}
        try:
            self._model, config = load_model(path, **classes)
        except Exception as error:  # its own code may raise anything
            raise BuildError(f"mlx-lm does not load {path}: {first_line(error)[:300]}.") from error
        states = [block["attention"] for block in config["block_configs"]]
        # A layer with a matrix has a place for a cache, too, which it leaves empty.
        places = [n for n, state in enumerate(states) if not state.get("no_op")]
        self.kv_layers = tuple(n for n in places if "n_heads_in_group" in states[n])

    def _empty(self) -> Any:
        return self._model.make_cache()

    def _logits(self, tokens: NDArray[Any], cache: Any) -> F32:
        ids = self._mx.array(tokens.astype(np.int32))[None]
        logits = self._model(ids, cache=cache)[0].astype(self._mx.float32)
        self._mx.eval(logits)
        return np.array(logits)

    def _sides(self, cache: Any) -> list[tuple[F32, F32]]:
        def side(array: Any, length: int) -> F32:
            return np.array(array.astype(self._mx.float32))[:, :, :length]

        kept = [one for one in cache if one.offset]
        return [(side(one.keys, one.offset), side(one.values, one.offset)) for one in kept]


def _renaming(config: Mapping[str, Any], renamed: Mapping[str, str]) -> tuple[Any, Any]:
    module: Any = importlib.import_module(f"mlx_lm.models.{config['model_type']}")

    class Renamed(module.Model):  # type: ignore[misc,name-defined]  # of a module found by its name
        def sanitize(self, weights: Mapping[str, Any]) -> Any:
            return super().sanitize({_name(key, renamed): value for key, value in weights.items()})

    return Renamed, module.ModelArgs


def _name(key: str, renamed: Mapping[str, str]) -> str:
    for other, own in renamed.items():
        key = key.replace(other, own)
    return key
