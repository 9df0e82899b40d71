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
from nbl_export.models.attention import count_positions
from nbl_export.models.folder import PREPROCESSOR, has_vocabulary, readable
from nbl_export.models.libraries import quiet
from nbl_export.models.multimodal import as_decoder, text_only
from nbl_export.models.source import ModelSource, check_config
from nbl_export.models.stored import Merged, as_stored, gguf_parsed_once, gguf_readers, stored_dtype
from nbl_export.models.tasks import task_named
from nbl_export.models.weights import (
    Read,
    Stored,
    by_identity,
    check_finite,
    convert_buffers,
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
    exact = all(p.dtype == torch.float32 for p in stored.model.parameters() if p.is_floating_point())
    return stored.model if exact and not stored.read else streamed(stored, torch.float32)


def load_stored(source: ModelSource, done: Callable[[int], None] = lambda _bytes: None) -> Stored:
    """The model as its files store it, mapped or dequantized when it is read; buffers are in float32.

    Raises :class:`InputError` if transformers cannot read the model, or for a weight that is NaN or infinite.
    """
    import torch

    made: dict[str, Merged] = {}
    with _files(source) as (path, options):
        if source.gguf_file:
            with reading(source), gguf_parsed_once():
                skeleton = _skeleton(source, path, options)
                read = gguf_readers(options["gguf_file"], skeleton)
            if read is not None:
                return _finished(source, skeleton, read, computed=True)
            model = _from_files(source, path, options)
        else:
            with reading(source):
                # In float32 the experts that transformers merges are in memory.
                put_off = stored_dtype(Path(source.path)) not in (None, torch.float32)
            with as_stored(put_off) as made:
                model = _from_files(source, path, {"use_safetensors": True})
    for name, weight in model.named_parameters():
        merged = made[name].sources.values() if name in made else [[weight]]
        for tensor in (tensor for group in merged for tensor in group):
            check_finite(source.source, name, tensor)
            done(tensor.nbytes)
    convert_buffers(model, torch.float32, torch.device("cpu"))
    return _finished(source, model, {id(model.get_parameter(name)): read for name, read in made.items()})


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
def reading(source: ModelSource, what: str = "transformers cannot load") -> Iterator[None]:
    """Say in one sentence why ``source`` cannot be loaded."""
    try:
        yield
    except BaseException as error:  # transformers raises almost anything for an unreadable model
        raise refused(f"{what} {source.source}", error, source) from error


def _from_files(source: ModelSource, path: str, options: dict[str, Any]) -> Any:
    """The model by transformers' own loading."""
    import torch

    with reading(source):
        model, info = _class(source).from_pretrained(
            path, output_loading_info=True, dtype=torch.float32, **_trusted(source), **options
        )
    missing_keys = sorted(info["missing_keys"])
    if (
        missing_keys
        and not task_named(source.task).causal
        and {k.split(".")[0] for k in missing_keys} == {"pooler"}
    ):
        model.pooler, missing_keys = None, []  # saved without one, as sentence-transformers often does
    check_config(source.source, model.config.to_dict())
    if missing_keys:
        raise InputError(
            f"{source.source} has no weights for {missing_keys[0]} and {len(missing_keys) - 1} more, which "
            f"{type(model).__name__} needs: download it again, or correct the `architectures` in its config.json."
        )
    return model


def _class(source: ModelSource) -> Any:
    """What loads the model: the class of its task, or that of a multimodal model without its towers."""
    import transformers

    if source.wrapper:
        return text_only(source.wrapper)
    return getattr(transformers, task_named(source.task).loads)


def _trusted(source: ModelSource) -> dict[str, bool]:
    return {} if source.wrapper else {"trust_remote_code": source.trust_remote_code}


def _finished(source: ModelSource, model: Any, read: Mapping[int, Read], computed: bool = False) -> Stored:
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

    with _files(source) as (path, _), reading(source):
        return transformers.AutoConfig.from_pretrained(path, **_trusted(source))


def load_skeleton(source: ModelSource) -> torch.nn.Module:
    """The model by its configuration, without bytes: neither weights nor buffers; raises as :func:`load_stored`."""
    with _files(source) as (path, options), reading(source):
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
    make = kind._from_config if source.wrapper else kind.from_config
    with init_empty_weights(include_buffers=False):
        model = make(config, dtype=torch.float32, **_trusted(source))
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
    try:
        tokenizer = load_beside(source, "AutoTokenizer", "tokenizer")
    except InputError as error:
        if source.gguf_file or has_vocabulary(Path(source.path)):
            raise
        raise InputError(
            f"{source.source} has no tokenizer: put the tokenizer.json, or the tokenizer.model, of the model into "
            f"{source.path}."
        ) from error
    tokenizer.name_or_path = source.path
    return tokenizer


def load_image_processor(source: ModelSource) -> Any:
    """The model's image processor, or an error with the reason why it cannot be loaded."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise missing("pillow", "Reading images") from None
    check_processor(source)
    return load_beside(source, "AutoImageProcessor", "image processor")


def load_beside(source: ModelSource, auto: str, what: str) -> Any:
    """What the class ``auto`` of transformers loads from the model's folder; ``what`` it is, for the sentence."""
    import transformers

    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    place: AbstractContextManager[str] = readable(Path(source.path))
    if source.gguf_file:
        options["gguf_file"], place = source.gguf_file, contextlib.nullcontext(source.path)
    with quiet(), place as path, reading(source, f"No {what} can be loaded from"):
        return getattr(transformers, auto).from_pretrained(path, **options)


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

    streaming = streaming_of(model)
    return streamed(streaming.stored, getattr(torch, dtype), streaming.device if device is None else device)


def in_memory(model: torch.nn.Module, device: torch.device | str) -> torch.nn.Module:
    """``model`` with all its weights on ``device``, for passes that are timed: nothing is read in one."""
    import torch

    streaming = streaming_of(model)
    if streaming.stored.model is model:
        return model.to(device)
    memo: dict[int, Any] = {
        key: torch.nn.Parameter(streaming.weights[names[0]].value().to(device), requires_grad=False)
        for key, (_, names) in by_identity(streaming.stored.model).items()
    }
    made: torch.nn.Module = copy.deepcopy(streaming.stored.model, memo)
    convert_buffers(made, streaming.dtype, torch.device(device))
    return made
