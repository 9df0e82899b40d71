"""Read a model as its files store it: tensors of safetensors mapped, those of GGUF dequantized one by one.

transformers rounds each tensor while it loads a model, and makes some weights of several tensors, such as those of the
experts of a layer. Here a tensor is mapped in its own dtype, and such a weight is made when it is read.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

from nbl_export.errors import InputError, first_line
from nbl_export.models.attention import count_positions
from nbl_export.models.folder import readable, task_named, weight_files
from nbl_export.models.multimodal import as_decoder, text_only
from nbl_export.models.running import quiet, replaced
from nbl_export.models.source import ModelSource, check_config
from nbl_export.models.weights import Read, Stored, check_finite, convert_buffers

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_Tensors = Mapping[str, Sequence[torch.Tensor]]


def load_stored(source: ModelSource, done: Callable[[int], None] = lambda _bytes: None) -> Stored:
    """The model with the head of its task, ``eval``, as its files store it; buffers are in float32.

    Its weights are mapped, or dequantized when they are read. That all mapped ones are numbers is looked at here, and
    ``done`` is told of their bytes. Raises :class:`InputError` if transformers cannot read the model, or for a weight
    that is NaN or infinite.
    """
    model: Any
    made: dict[str, Merged] = {}
    read: Mapping[int, Read] = {}
    with opened(source) as (path, options):
        if source.gguf_file:
            model = _skeleton(source, path, options)
            read = gguf_readers(options["gguf_file"], model)
        if not read:
            with as_stored(source) as made:
                model = _from_files(source, path, options)
    for name, weight in () if read else model.named_parameters():
        merged = made[name].sources.values() if name in made else [[weight]]
        for tensor in (tensor for group in merged for tensor in group):
            check_finite(source.source, name, tensor)
            done(tensor.nbytes)
    convert_buffers(model, torch.float32, torch.device("cpu"))
    found = read or {id(model.get_parameter(name)): merged for name, merged in made.items()}
    if source.wrapper:
        model = as_decoder(model)
    model.config.name_or_path = source.path
    # A dequantized model is an ordinary model, but this attribute would prevent saving it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.hf_quantizer = None
    text = model.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) and text._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # sdpa has no soft-capped scores
    count_positions(model)
    return Stored(model.eval().requires_grad_(False), found, source.source, computed=bool(read))


def load_config(source: ModelSource) -> Any:
    """The configuration of a folder as transformers reads it for the model; raises as :func:`load_stored`."""
    with opened(source) as (path, options):
        return transformers.AutoConfig.from_pretrained(path, **options)


def load_skeleton(source: ModelSource) -> torch.nn.Module:
    """The model by its configuration, without bytes: neither weights nor buffers; raises as :func:`load_stored`."""
    with opened(source) as (path, options):
        made: torch.nn.Module = _skeleton(source, path, options).to("meta").eval()
        return made


@contextmanager
def opened(
    source: ModelSource, what: str = "transformers cannot load"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The folder that transformers reads ``source`` from, and the options that say how, without its output.

    What it raises in the block becomes one sentence, which begins with ``what``.
    """
    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if source.gguf_file:
            import gguf

            # A GGUF file has all that a model needs; an adapter beside it would be loaded on top. A bare name is also
            # looked up in the current folder, before the model's.
            options["gguf_file"] = str(Path(source.path) / source.gguf_file)
            path = stack.enter_context(tempfile.TemporaryDirectory())
            # transformers parses the file for each thing that it reads from it, which takes seconds where the
            # vocabulary is large, and makes the table of names for each module of the model.
            for name in ("GGUFReader", "get_tensor_name_map"):
                stack.enter_context(replaced(gguf, name, cache(getattr(gguf, name))))
        else:
            path = stack.enter_context(readable(Path(source.path)))
        try:
            yield path, options
        except BaseException as error:  # transformers raises almost anything for an unreadable model
            raise refused(f"{what} {source.source}", error, source) from error


def refused(what: str, error: BaseException, source: ModelSource | None = None) -> InputError:
    """One sentence for what a library raised: its own panics are no ``Exception``. An interrupt is raised again.

    Of a ``source``, code that comes with the model and may not run is told with what to do.
    """
    if isinstance(error, (KeyboardInterrupt, SystemExit, InputError)):
        raise error
    if source and "trust_remote_code" in str(error) and not source.trust_remote_code:
        return InputError(
            f"{source.source} comes with code of its own, which runs only where you say so at this command: read the "
            f".py files in {source.path}, then give --trust-remote-code."
        )
    if source and "does not recognize this architecture" in str(error):
        return InputError(
            f"{source.source} has an architecture that transformers {transformers.__version__} does not know: install "
            "a version that knows it, or correct the model_type in its config.json."
        )
    return InputError(f"{what}: {first_line(error)[:300]}.")


def _class(source: ModelSource) -> Any:
    """What loads the model: the class of its task, or that of a multimodal model without its towers."""
    if source.wrapper:
        return text_only(source.wrapper)
    return getattr(transformers, task_named(source.task).loads)


def _from_files(source: ModelSource, path: str, options: dict[str, Any]) -> Any:
    """The model by transformers' own loading."""
    model, info = _class(source).from_pretrained(
        path,
        output_loading_info=True,
        dtype=torch.float32,
        use_safetensors=None if source.gguf_file else True,
        **options,
    )
    missing = sorted(info["missing_keys"])
    if missing and not task_named(source.task).causal and {k.split(".")[0] for k in missing} == {"pooler"}:
        model.pooler, missing = None, []  # saved without one, as sentence-transformers often does
    check_config(source.source, model.config.to_dict())
    if missing:
        raise InputError(
            f"{source.source} has no weights for {missing[0]} and {len(missing) - 1} more, which "
            f"{type(model).__name__} needs: download it again, or correct the `architectures` in its config.json."
        )
    return model


def _skeleton(source: ModelSource, path: str, options: dict[str, Any]) -> Any:
    """The model with its buffers in float32, and weights without bytes."""
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(path, **options)
    if source.gguf_file:
        check_config(source.source, config.to_dict())
    kind = _class(source)
    with init_empty_weights(include_buffers=False):
        if source.wrapper:
            model = kind._from_config(config, dtype=torch.float32)
        else:
            trust = source.trust_remote_code
            model = kind.from_config(config, dtype=torch.float32, trust_remote_code=trust)
    model.tie_weights()
    return model


# safetensors --------------------------------------------------------------------------------------


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype of most weights of ``folder``, by the headers of its files; None without any."""
    sizes: Counter[str] = Counter()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for tensor in map(file.get_slice, file.keys()):
                sizes[tensor.get_dtype()] += int(np.prod(tensor.get_shape()))
    return next((_FLOATS[kind] for kind, _ in sizes.most_common() if kind in _FLOATS), None)


@dataclass(frozen=True)
class Merged:
    """Makes the weight ``name`` of the ``sources``, the tensors of each pattern of transformers' conversion."""

    name: str
    sources: _Tensors
    make: Callable[[_Tensors], dict[str, torch.Tensor]]

    def __call__(self) -> torch.Tensor:
        return self.make(self.sources)[self.name]


@contextmanager
def as_stored(source: ModelSource) -> Iterator[dict[str, Merged]]:
    """Within the block, transformers maps tensors of safetensors as they are stored.

    A weight that it makes of several has no bytes, unless most are in float32: the value is what makes it, by its name.
    What cannot be put off is made at once.
    """
    from transformers import core_model_loading as loading

    found: dict[str, Merged] = {}
    plain = loading.WeightConverter.convert

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

    with ExitStack() as stack:
        if not source.gguf_file:
            mapped = replaced(loading, "_materialize_copy", lambda tensor, *_, **__: tensor[...])
            stack.enter_context(mapped)
            if stored_dtype(Path(source.path)) not in (None, torch.float32):
                stack.enter_context(replaced(loading.WeightConverter, "convert", convert))
        yield found


# GGUF ---------------------------------------------------------------------------------------------


def gguf_readers(path: str, model: Any) -> dict[int, Read]:
    """For each weight of ``model`` by ``id``, what dequantizes it from the GGUF file ``path``, in float32.

    Empty where transformers makes a weight of several tensors of the file, as of the experts of a layer.
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
            return {}  # transformers says what is wrong
        shape = tuple(weights[name].shape)
        found[id(weights[name])] = partial(_dequantized, tensor, processor, names, shape)
    return found if found.keys() >= {id(weight) for weight in weights.values()} else {}


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
