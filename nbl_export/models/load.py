"""Load a model and its tokenizer or processor into PyTorch, in float32 and without console output."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.batch.names import PIXELS
from nbl_export.errors import InputError, first_line
from nbl_export.files import parse_json
from nbl_export.models.attention import count_positions
from nbl_export.models.folder import PREPROCESSOR, has_vocabulary, readable
from nbl_export.models.libraries import quiet
from nbl_export.models.multimodal import as_decoder, text_only
from nbl_export.models.source import ModelSource, check_config
from nbl_export.models.stored import (
    Merged,
    gguf_parsed_once,
    gguf_readers,
    put_off,
    same_weights,
    stored_tensors,
    take_buffers,
)
from nbl_export.models.tasks import task_named
from nbl_export.models.weights import (
    Read,
    Stored,
    by_identity,
    check_finite,
    convert_buffers,
    device_of,
    reader,
    stored_of,
    streamed,
    streaming_of,
)
from nbl_export.packages import missing

if TYPE_CHECKING:
    import torch


def load_model(source: ModelSource, done: Callable[[int], None] = lambda _bytes: None) -> torch.nn.Module:
    """The model with the head of its task in float32, ``eval`` mode, without gradients.

    Its weights are read when they are needed (:mod:`.weights`); that all are numbers is looked at here, and ``done`` is
    told of the bytes. Raises the errors of :func:`load_stored`.
    """
    import torch

    stored = load_stored(source, done)
    return stored.model if stored.is_plain(torch.float32) else streamed(stored, torch.float32)


def load_stored(source: ModelSource, done: Callable[[int], None] = lambda _bytes: None) -> Stored:
    """The model as its files store it, mapped or dequantized when it is read.

    What cannot be mapped, because transformers converts it, is in memory in float32. Raises :class:`InputError` if
    transformers cannot read the model.
    """
    import torch

    with _files(source) as (path, options):
        if source.gguf_file:
            with _reading(source), gguf_parsed_once():
                skeleton = _skeleton(source, path, options)
                dequantized = gguf_readers(options["gguf_file"], skeleton)
            if dequantized is not None:
                return _finished(source, skeleton, dequantized, computed=True)
            return _in_memory(source, _from_files(source, path, {**options, "dtype": torch.float32})[0])
        with _reading(source):
            tensors = stored_tensors(Path(source.path))
        dtype = tensors.dtype or torch.float32
        # In float32 the experts that transformers merges are in memory, like everything that it converts.
        nothing: AbstractContextManager[dict[str, Merged]] = contextlib.nullcontext({})
        with put_off() if dtype != torch.float32 else nothing as merged:
            model, unused = _from_files(source, path, {"dtype": dtype})
        if dtype == torch.float32 and not tensors.others:
            return _in_memory(source, model)
        with _reading(source):
            skeleton = _skeleton(source, path, {})
            mapped = tensors.put_others(model, unused) and same_weights(skeleton, model)
        if not mapped:
            return _in_memory(source, _from_files(source, path, {"dtype": torch.float32})[0])
    take_buffers(skeleton, model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in weights.items():
        made_of = merged[name].sources.values() if name in merged else [[weight]]
        for tensor in (tensor for group in made_of for tensor in group):
            check_finite(source.source, name, tensor)
            done(tensor.nbytes)
    made: dict[int, Read] = {id(weights[name]): read for name, read in merged.items()}
    if hasattr(model, "generation_config"):
        skeleton.generation_config = model.generation_config
    return _finished(source, skeleton, {n: made.get(id(w)) or reader(w) for n, w in weights.items()})


@contextmanager
def _files(source: ModelSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """The folder that transformers reads ``source`` from, and the options that say how, without its output."""
    with quiet():
        if source.gguf_file:
            # A GGUF file has all that a model needs; an adapter beside it would be loaded on top. A bare name is also
            # looked up in the current folder, before the model's.
            with tempfile.TemporaryDirectory() as path:
                yield path, {"gguf_file": str(Path(source.path) / source.gguf_file)}
        else:
            with readable(Path(source.path)) as path:
                yield path, {}


@contextmanager
def _reading(source: ModelSource, what: str = "transformers cannot load") -> Iterator[None]:
    """Say in one sentence why ``source`` cannot be loaded."""
    try:
        yield
    except BaseException as error:  # transformers raises almost anything for an unreadable model
        raise refused(f"{what} {source.source}", error, source) from error


def _from_files(source: ModelSource, path: str, options: dict[str, Any]) -> tuple[Any, set[str]]:
    """The model by transformers' own loading, and the tensors of its files that it does not use."""
    import transformers

    task = task_named(source.task)
    if not source.gguf_file:
        options = {**options, "use_safetensors": True}
    with _reading(source):
        model, info = _class(source).from_pretrained(
            path, output_loading_info=True, **_trusted(source), **options
        )
    missing_keys = sorted(info["missing_keys"])
    if not task.causal and missing_keys and all(key.startswith("pooler.") for key in missing_keys):
        model.pooler, missing_keys = None, []  # saved without one, as sentence-transformers often does
    check_config(source.source, model.config.to_dict())
    saved = (getattr(model.config, "architectures", None) or [""])[0]
    if missing_keys and saved != type(model).__name__ and hasattr(transformers, saved):
        raise InputError(
            f"{source.source} is saved as {saved}, and {task.loads} of transformers makes a {type(model).__name__} of "
            f"it, which needs more weights (as {missing_keys[0]}): this architecture is not supported yet."
        )
    if missing_keys:
        raise InputError(
            f"{source.source} has no weights for {missing_keys[0]} and {len(missing_keys) - 1} more: download the "
            "model again."
        )
    return model, set(info["unexpected_keys"])


def _class(source: ModelSource) -> Any:
    """What loads the model: the class of its task, or that of a multimodal model without its towers.

    transformers' own class where its class of the task does not list it, as Mistral4ForCausalLM.
    """
    import transformers

    if source.wrapper:
        return text_only(source.wrapper)
    auto = getattr(transformers, task_named(source.task).loads)
    if source.gguf_file:
        return auto
    raw = parse_json((Path(source.path) / "config.json").read_text(encoding="utf-8"))
    named: Any = getattr(transformers, (raw.get("architectures") or [""])[0], None)
    of_type = getattr(named, "config_class", None)
    alone = getattr(of_type, "model_type", "") == raw.get("model_type") and of_type not in auto._model_mapping
    return named if alone and "auto_map" not in raw else auto


def _trusted(source: ModelSource) -> dict[str, bool]:
    return {} if source.wrapper else {"trust_remote_code": source.trust_remote_code}


def _in_memory(source: ModelSource, model: Any) -> Stored:
    for name, weight in model.named_parameters():
        check_finite(source.source, name, weight)
    return _finished(source, model, {})


def _finished(source: ModelSource, model: Any, read: Mapping[str, Read], computed: bool = False) -> Stored:
    if source.wrapper:
        before = by_identity(model)
        model = as_decoder(model)
        after = by_identity(model)
        read = {
            new: read[n]
            for k, (_, names) in before.items()
            for n in names
            if n in read
            for new in after[k][1]
        }
    model.config.name_or_path = source.path
    # A dequantized model is an ordinary model, but this attribute would prevent saving it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.hf_quantizer = None
    text = model.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None) and text._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")  # sdpa has no soft-capped scores
    count_positions(model)
    return Stored(model.eval().requires_grad_(False), read, source.source, computed)


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
        import transformers

        return InputError(
            f"{source.source} has an architecture that transformers {transformers.__version__} does not know: install "
            "a version that knows it, or correct the model_type in its config.json."
        )
    return InputError(f"{what}: {first_line(error)[:300]}.")


def load_config(source: ModelSource) -> Any:
    """The configuration of a folder as transformers reads it for the model; raises as :func:`load_stored`."""
    import transformers

    with _files(source) as (path, _), _reading(source):
        try:
            return transformers.AutoConfig.from_pretrained(path, **_trusted(source))
        except Exception:
            # What no class of the task lists has a configuration that AutoConfig may not know, too.
            kind = None if source.wrapper else _class(source)
            if kind is None or hasattr(kind, "from_config"):
                raise
            return kind.config_class.from_pretrained(path)


def load_skeleton(source: ModelSource) -> torch.nn.Module:
    """The model by its configuration, without bytes: neither weights nor buffers; raises as :func:`load_stored`."""
    with _files(source) as (path, options), _reading(source):
        made: torch.nn.Module = _skeleton(source, path, options).to("meta").eval()
        return made


def _skeleton(source: ModelSource, path: str, options: dict[str, Any]) -> Any:
    """The model with its buffers in float32, and weights without bytes."""
    import torch
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(path, **_trusted(source), **options)
    if options:
        check_config(source.source, config.to_dict())
    kind = _class(source)
    with init_empty_weights(include_buffers=False):
        if hasattr(kind, "from_config"):
            model = kind.from_config(config, dtype=torch.float32, **_trusted(source))
        else:
            model = kind._from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def check_processor(source: ModelSource) -> None:
    """Refuse, before the model is read, one without the files of its tokenizer or image processor."""
    if source.reads != PIXELS:
        if not source.gguf_file and not has_vocabulary(Path(source.path)):
            load_tokenizer(source)  # some need no file
    elif not (Path(source.path) / PREPROCESSOR).is_file():
        raise InputError(
            f"{source.source} has no {PREPROCESSOR}, which says how its images are scaled: add the one that the "
            "model was trained with."
        )


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, or an :class:`InputError` with the reason why it cannot be loaded."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    place: AbstractContextManager[str] = readable(Path(source.path))
    if source.gguf_file:
        options["gguf_file"], place = source.gguf_file, contextlib.nullcontext(source.path)
    with quiet(), place as path:
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
        except BaseException as error:
            if not source.gguf_file and not has_vocabulary(Path(source.path)):
                raise InputError(
                    f"{source.source} has no tokenizer: put the tokenizer.json, or the tokenizer.model, of the model "
                    f"into {source.path}."
                ) from error
            raise refused(f"No tokenizer can be loaded from {source.source}", error, source) from error
    tokenizer.name_or_path = source.path
    return tokenizer


def load_image_processor(source: ModelSource) -> Any:
    """The model's image processor, or an error with the reason why it cannot be loaded."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise missing("pillow", "Reading images") from None
    from transformers import AutoImageProcessor

    check_processor(source)
    with quiet(), _reading(source, "No image processor can be loaded from"):
        return AutoImageProcessor.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)


def fast_dtype(device: torch.device | str = "cpu") -> str:
    """The dtype in which ``device`` runs a model fastest: bfloat16 if it multiplies that, else float32."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # torch 2.13 has a public function for this; earlier releases have only these.
        private = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        able = device.type != "cpu" or any(getattr(torch.cpu, name, bool)() for name in private)
    return "bfloat16" if able else "float32"


def in_precision(
    model: torch.nn.Module, dtype: str, device: torch.device | str | None = None
) -> torch.nn.Module:
    """Another ``model`` with its weights in ``dtype`` (float16 …) on ``device``, as transformers would load it.

    Without a ``device`` it is on that of ``model``. Buffers that are not part of a checkpoint (rotary frequencies) stay
    in their precision.
    """
    import torch

    device = device_of(model) if device is None else device
    return streamed(stored_of(model), getattr(torch, dtype), device)


def in_memory(model: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """``model`` with all its weights on ``device``, for passes that are timed: nothing is read in one."""
    import torch

    streaming = streaming_of(model)
    if streaming is None:
        return model.to(device)
    memo: dict[int, Any] = {
        key: torch.nn.Parameter(streaming.value(streaming.weights[names[0]]).to(device), requires_grad=False)
        for key, (_, names) in by_identity(streaming.stored.model).items()
    }
    made: torch.nn.Module = copy.deepcopy(streaming.stored.model, memo)
    convert_buffers(made, streaming.dtype, torch.device(device))
    return made
