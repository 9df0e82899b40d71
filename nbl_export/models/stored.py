"""The tensors of a checkpoint as they are stored: their dtypes, and the readers of a GGUF file."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from nbl_export.models.compat import names_in
from nbl_export.models.limits import INDEX, WEIGHTS, indexed
from nbl_export.models.replacing import replaced
from nbl_export.models.weights import Read, floating

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        named = names_in(model) if self.others else str
        for key, path in self.others.items():
            if key in unused or named(key) in unused:
                continue
            names = [n for n in (named(key), key, f"{prefix}{key}", key.removeprefix(prefix)) if n in places]
            with safe_open(path, framework="pt") as file:
                tensor = file.get_slice(key)[...]
            if not names or not _put(model, names[0], tensor):
                return False
        return True


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


def stored_tensors(folder: Path) -> StoredTensors:
    """What the weight files of ``folder`` store, by their headers."""
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []
    if not files and (folder / INDEX).is_file():
        files = sorted(indexed(folder))
    kinds: dict[str, tuple[str, Path]] = {}
    sizes: Counter[str] = Counter()
    for path in files:
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


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two models have weights of the same names and shapes."""
    return [(n, p.shape) for n, p in floating(a)] == [(n, p.shape) for n, p in floating(b)]


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
    takes_processor = "processor" in inspect.signature(get_gguf_hf_weights_map).parameters
    names = get_gguf_hf_weights_map(model, processor) if takes_processor else get_gguf_hf_weights_map(model)
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
