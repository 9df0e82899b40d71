"""A linearized model in transformers as a :class:`~nbl_export.runtime.stream.Stream`: each row has transformers' own
cache, as it has in `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import BOOL, F32
from nbl_export.errors import BuildError, first_line
from nbl_export.models.compat import cache_argument
from nbl_export.models.load import quiet
from nbl_export.models.registered import register
from nbl_export.runtime.decoder import KV


class TransformersStream:
    """The folder at ``path``, loaded as a user does, by classes that :mod:`nbl_export.transformers` registers.

    Raises :class:`BuildError` for a folder that transformers does not load whole.
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
        config, count = self.model.config, self.model.config.num_hidden_layers
        linear = {path.split(".")[-2] for path in _attentions(config.nbl)}
        self.kv_layers = tuple(i for i in range(count) if str(i) not in linear)
        self._caches: list[Any] = []

    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        from transformers import DynamicCache

        # Without a configuration it keeps what is behind a window, too: every key and value can be compared.
        self._caches = [DynamicCache() for _ in rows]
        return np.concatenate([self._read(n, row) for n, row in enumerate(rows)])

    def decode(self, tokens: Sequence[int]) -> F32:
        return np.concatenate([self._read(n, [token]) for n, token in enumerate(tokens)])

    def _read(self, row: int, tokens: Sequence[int] | NDArray[Any]) -> F32:
        import torch

        ids = torch.tensor(np.asarray(tokens, np.int64))[None]
        with torch.inference_mode():
            given = {cache_argument(self.model): self._caches[row]}
            logits = self.model(input_ids=ids, use_cache=True, **given).logits[0]
        found: F32 = logits.float().numpy()
        return found

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        lengths = np.array([cache.get_seq_length() for cache in self._caches])
        longest = int(lengths.max(initial=0))
        found: list[KV] = [
            (
                np.concatenate([_slots(cache.layers[at].keys, longest) for cache in self._caches]),
                np.concatenate([_slots(cache.layers[at].values, longest) for cache in self._caches]),
            )
            for at in range(len(self.kv_layers))
        ]
        return found, np.arange(longest)[None] < lengths[:, None]

    @property
    def cached(self) -> int:
        """The entries of the cache that have any keys and values after a prefill."""
        return sum(one.get_seq_length() > 0 for one in self._caches[0].layers)

    def reserve(self, tokens: int) -> None:
        return None


def _attentions(nbl: Any) -> list[str]:
    return [path for path in nbl["modules"] if path.endswith(f".{nbl['attention']}")]


def _slots(side: Any, longest: int) -> F32:
    """One row's keys or values [1, heads, longest, head_dim], with zeros where it is shorter."""
    own = side.float().numpy()
    return np.pad(own, ((0, 0), (0, 0), (0, longest - own.shape[2]), (0, 0)))
