"""A linearized model in transformers as a :class:`~nbl_export.runtime.stream.Stream`: each row has transformers' own
cache, as it has in `generate`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32
from nbl_export.errors import BuildError, first_line
from nbl_export.models.libraries import cache_argument, quiet
from nbl_export.models.registered import register
from nbl_export.runtime.stream import RowStream


class TransformersStream(RowStream):
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

    def _length(self, cache: Any) -> int:
        return int(cache.get_seq_length())

    def _sides(self, cache: Any, number: int) -> tuple[F32, F32]:
        own = cache.layers[number]
        return own.keys.float().numpy(), own.values.float().numpy()

    @property
    def cached(self) -> int:
        """The entries of the cache that have any keys and values after a prefill."""
        return sum(one.get_seq_length() > 0 for one in self._caches[0].layers)


def _attentions(nbl: Any) -> list[str]:
    return [path for path in nbl["modules"] if path.endswith(f".{nbl['attention']}")]
