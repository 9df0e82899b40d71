"""Weights that transformers makes of several tensors of a checkpoint, such as those of the experts of a layer.

While it loads a model it makes them all, which takes as much memory as the model. Here it makes a weight when that is
read, by its own conversion, of the mapped tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nbl_export.models.compat import weight_converter

_Tensors = Mapping[str, Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Merged:
    """Makes the weight ``name`` of the ``sources``, the tensors of each pattern of transformers' conversion."""

    name: str
    sources: _Tensors
    make: Callable[[_Tensors], dict[str, torch.Tensor]]

    def __call__(self) -> torch.Tensor:
        return self.make(self.sources)[self.name]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors of the checkpoint that the weight is made of."""
        return [tensor for tensors in self.sources.values() for tensor in tensors]


@contextmanager
def put_off() -> Iterator[dict[str, Merged]]:
    """Within the block, a weight that transformers makes while it loads a model has no bytes.

    The value is what makes it, by its name. What cannot be put off is made at once.
    """
    found: dict[str, Merged] = {}
    converter = weight_converter()
    if converter is None:
        yield found
        return
    plain = converter.convert

    def convert(self: Any, layer_name: str, model: Any = None, **options: Any) -> dict[str, Any]:
        if options.get("hf_quantizer") is not None:
            made: dict[str, Any] = plain(self, layer_name, model=model, **options)
            return made
        sources = self.materialize_tensors()

        def make(tensors: _Tensors) -> dict[str, torch.Tensor]:
            self.collected_tensors.update({pattern: list(group) for pattern, group in tensors.items()})
            values = plain(self, layer_name, model=model, config=options.get("config"))
            return {name: v[0] if isinstance(v, list) else v for name, v in values.items()}

        try:
            shapes = make({pattern: [t.to("meta") for t in group] for pattern, group in sources.items()})
            for name in shapes:
                model.get_parameter(name)
        except Exception:  # an operation that needs the numbers, or what is no parameter
            self.collected_tensors.clear()
            self.collected_tensors.update(sources)
            return dict(plain(self, layer_name, model=model, **options))
        found.update({name: Merged(name, sources, make) for name in shapes})
        return {name: torch.zeros((), dtype=s.dtype).expand(s.shape) for name, s in shapes.items()}

    converter.convert = convert
    try:
        yield found
    finally:
        converter.convert = plain
