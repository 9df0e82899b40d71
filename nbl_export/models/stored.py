"""Read the tensors of a checkpoint as they are stored: of safetensors mapped, of GGUF dequantized one by one.

transformers makes some weights of several tensors of a checkpoint, such as those of the experts of a layer, all of them
while it loads a model. Within :func:`put_off` such a weight is made when it is read, of the mapped tensors.
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
from nbl_export.models.weights import Read, floating

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_Tensors = Mapping[str, Sequence[torch.Tensor]]


@dataclass(frozen=True)
class StoredTensors:
    """The floating tensors of safetensors files: the dtype of most of their weights, and where the ``others`` are."""

    dtype: torch.dtype | None
    others: Mapping[str, Path]

    def put_others(self, model: Any, unused: set[str]) -> bool:
        """Give ``model``, loaded in ``dtype``, the others as they are stored; whether there is a place for each."""
        prefix = f"{model.base_model_prefix}."
        places = {
            name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
        }
        named = _names_in(model) if self.others else str
        for key, path in self.others.items():
            if key in unused or named(key) in unused:
                continue
            names = [n for n in (named(key), key, f"{prefix}{key}", key.removeprefix(prefix)) if n in places]
            with safe_open(path, framework="pt") as file:
                tensor = file.get_slice(key)[...]
            if not names or not _put(model, names[0], tensor):
                return False
        return True


def stored_tensors(folder: Path) -> StoredTensors:
    """What the weight files of ``folder`` store, by their headers."""
    kinds: dict[str, tuple[str, Path]] = {}
    sizes: Counter[str] = Counter()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_slice(name)
                kind = tensor.get_dtype()
                if kind in _FLOATS:
                    kinds[name] = kind, path
                    sizes[kind] += int(np.prod(tensor.get_shape()))
    if not sizes:
        return StoredTensors(None, {})
    most = max(sizes, key=lambda kind: sizes[kind])
    return StoredTensors(_FLOATS[most], {n: path for n, (kind, path) in kinds.items() if kind != most})


def _names_in(model: Any) -> Callable[[str], str]:
    """What gives the name in ``model`` of a tensor of a checkpoint, by the renamings of transformers."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    renamings = [one for one in mapping if not isinstance(one, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    return lambda name: str(rename_source_key(name, renamings, converters, prefix, state)[0])


def _put(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> bool:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if attribute in module._buffers:
        old = module._buffers[attribute]
        module._buffers[attribute] = tensor
    else:
        old = module._parameters[attribute]
        if old is not None:
            old.data = tensor  # a tied weight stays tied
    return old is not None and old.shape == tensor.shape


def take_buffers(skeleton: torch.nn.Module, model: torch.nn.Module) -> None:
    """Give ``skeleton`` those buffers of ``model`` that come from its files, as the decay of MiniMax's layers does."""
    stored, own = model.state_dict().keys(), dict(skeleton.named_buffers())
    for name, buffer in model.named_buffers():
        if name in stored and name in own:
            own[name].copy_(buffer)


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models have weights of the same names and shapes."""
    return [(n, p.shape) for n, p in floating(a)] == [(n, p.shape) for n, p in floating(b)]


# weights of several tensors -----------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """Makes the weight ``name`` of the ``sources``, the tensors of each pattern of transformers' conversion."""

    name: str
    sources: _Tensors
    make: Callable[[_Tensors], dict[str, torch.Tensor]]

    def __call__(self) -> torch.Tensor:
        return self.make(self.sources)[self.name]


@contextmanager
def put_off() -> Iterator[dict[str, Merged]]:
    """Within the block, a weight that transformers makes while it loads a model has no bytes.

    The value is what makes it, by its name. What cannot be put off is made at once.
    """
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

    with replaced(WeightConverter, "convert", convert):
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


def gguf_readers(path: str, model: Any) -> dict[str, Read] | None:
    """For each weight of ``model``, what dequantizes it from the GGUF file ``path``, in float32.

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
    found: dict[str, Read] = {}
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is None or name not in weights or "exps" in tensor.name:
            continue
        if int(np.prod(tensor.shape)) != weights[name].numel():
            return None  # transformers says what is wrong
        found[name] = partial(_dequantized, tensor, processor, names, tuple(weights[name].shape))
    tied = {id(weights[name]) for name in found}
    return found if all(id(weight) in tied for weight in weights.values()) else None


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
