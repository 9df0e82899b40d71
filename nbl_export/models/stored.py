"""Read the tensors of a checkpoint as they are stored: of safetensors mapped, of GGUF dequantized one by one.

transformers rounds each tensor while it loads a model, and makes some weights of several tensors, such as those of the
experts of a layer. Within :func:`as_stored` a tensor is mapped in its own dtype, and such a weight is made when it is
read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from nbl_export.models.folder import weight_files
from nbl_export.models.libraries import replaced
from nbl_export.models.weights import Read

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_Tensors = Mapping[str, Sequence[torch.Tensor]]


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of most weights of ``folder``, by the headers of its files; None without any."""
    sizes: Counter[str] = Counter()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for tensor in map(file.get_slice, file.keys()):
                sizes[tensor.get_dtype()] += int(np.prod(tensor.get_shape()))
    floats = [kind for kind, _ in sizes.most_common() if kind in _FLOATS]
    return _FLOATS[floats[0]] if floats else None


@dataclass(frozen=True)
class Merged:
    """Makes the weight ``name`` of the ``sources``, the tensors of each pattern of transformers' conversion."""

    name: str
    sources: _Tensors
    make: Callable[[_Tensors], dict[str, torch.Tensor]]

    def __call__(self) -> torch.Tensor:
        return self.make(self.sources)[self.name]


@contextmanager
def as_stored(put_off: bool) -> Iterator[dict[str, Merged]]:
    """Within the block, transformers maps tensors as they are stored.

    With ``put_off`` a weight that it makes of several has no bytes. The value is what makes it, by its name. What
    cannot be put off is made at once.
    """
    from transformers import core_model_loading
    from transformers.core_model_loading import WeightConverter

    found: dict[str, Merged] = {}
    plain = WeightConverter.convert

    def convert(self: Any, layer_name: str, model: Any = None, **options: Any) -> dict[str, Any]:
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

    with ExitStack() as within:
        mapped = replaced(core_model_loading, "_materialize_copy", lambda tensor, *_, **__: tensor[...])
        within.enter_context(mapped)
        if put_off:
            within.enter_context(replaced(WeightConverter, "convert", convert))
        yield found


# GGUF ---------------------------------------------------------------------------------------------


@contextmanager
def gguf_parsed_once() -> Iterator[None]:
    """Within the block a GGUF file is parsed once, and the table of its names made once, however often that is asked.

    transformers parses the file for each thing that it reads from it, which takes seconds where the vocabulary is
    large, and makes the table for each module of the model.
    """
    import gguf

    with ExitStack() as stack:
        for name in ("GGUFReader", "get_tensor_name_map"):
            stack.enter_context(replaced(gguf, name, cache(getattr(gguf, name))))
        yield


def gguf_readers(path: str, model: Any) -> dict[int, Read] | None:
    """For each weight of ``model`` by ``id``, what dequantizes it from the GGUF file ``path``, in float32.

    None where transformers makes a weight of several tensors of the file, as of the experts of a layer.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    reader = GGUFReader(path)
    architecture = read_field(reader, "general.architecture")[0]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    weights = dict(model.named_parameters(remove_duplicate=False))
    found: dict[int, Read] = {}
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is None or name not in weights or "exps" in tensor.name:
            continue
        if int(np.prod(tensor.shape)) != weights[name].numel():
            return None  # transformers says what is wrong
        shape = tuple(weights[name].shape)
        found[id(weights[name])] = partial(_dequantized, tensor, processor, names, shape)
    return found if found.keys() >= {id(weight) for weight in weights.values()} else None


def _dequantized(
    tensor: Any, processor: Any, names: Mapping[str, str], shape: tuple[int, ...]
) -> torch.Tensor:
    from gguf import dequantize

    made = processor.process(
        weights=dequantize(tensor.data, tensor.tensor_type),
        name=tensor.name,
        tensor_key_mapping=names,
        parsed_parameters={"tensors": {}},
    )
    if made.name != tensor.name or made.weights.shape != shape:
        raise ValueError(f"the tensor {tensor.name} has the shape {made.weights.shape}, not {shape}")
    return torch.from_numpy(np.array(made.weights, dtype=np.float32))
