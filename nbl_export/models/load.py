"""Load a model and its tokenizer or image processor into PyTorch, in float32 and without console output."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.errors import InputError, MissingDependencyError
from nbl_export.files import parse_json
from nbl_export.models.compat import enable_softcapping, is_transformers_4, neutral_folder, readable_folder
from nbl_export.models.limits import check_built, weights_of
from nbl_export.models.source import ModelSource, check_config
from nbl_export.models.tasks import task_named
from nbl_export.models.tokenizer_limits import check_tokenizer

if TYPE_CHECKING:
    import torch

PREPROCESSOR = "preprocessor_config.json"


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars, warnings and log lines of the libraries within the block."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        # Some progress bars cannot be disabled; they write to sys.stderr.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


@contextmanager
def _readable(source: ModelSource) -> Iterator[str]:
    """The folder of ``source`` with configurations that the installed transformers reads correctly.

    They choose no implementation and name no file.
    """
    made = readable_folder if is_transformers_4() else neutral_folder
    with tempfile.TemporaryDirectory() as scratch:
        yield str(made(Path(source.path), Path(scratch) / Path(source.path).name))


def load_model(source: ModelSource) -> torch.nn.Module:
    """The model with the head of its task in float32, ``eval`` mode, without gradients.

    GGUF weights are dequantized. Raises :class:`InputError` if transformers cannot read the model.
    """
    import torch
    import transformers

    task = task_named(source.task)
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": source.trust_remote_code}
    if source.gguf_file:
        # A bare name is also looked up in the current folder, before the model's.
        options["gguf_file"] = str(Path(source.path) / source.gguf_file)
    else:
        options["use_safetensors"] = True
    # A GGUF file has all that a model needs; an adapter beside it would be loaded on top.
    with quiet(), tempfile.TemporaryDirectory() if source.gguf_file else _readable(source) as path:
        if not source.gguf_file:
            _check_size(source, task.loads, path)
        try:
            model, info = getattr(transformers, task.loads).from_pretrained(
                path, output_loading_info=True, **options
            )
        except BaseException as error:  # transformers raises almost anything for an unreadable model
            raise _unreadable(f"transformers cannot load {source.source}", source, error) from error
    model.config.name_or_path = source.path
    check_config(source.source, model.config.to_dict())
    missing = sorted(info["missing_keys"])
    if not task.causal and missing and all(key.startswith("pooler.") for key in missing):
        model.pooler, missing = None, []  # saved without one, as sentence-transformers often does
    if missing:
        raise InputError(
            f"{source.source} has no weights for {missing[0]} and {len(missing) - 1} more: download the model again."
        )
    for name, weight in model.named_parameters():
        if not bool(torch.isfinite(weight).all()):
            raise InputError(
                f"{source.source}: the weight {name} is NaN or infinite: download the model again."
            )
    # A dequantized model is an ordinary model, but this attribute would prevent saving it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.hf_quantizer = None
    enable_softcapping(model)
    loaded: torch.nn.Module = model.eval().requires_grad_(False)
    return loaded


def _check_size(source: ModelSource, loads: str, path: str) -> None:
    """Refuse a model that would be larger than its weight files; it is built on torch's meta device, of no bytes."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=source.trust_remote_code)
        with torch.device("meta"):
            model = getattr(transformers, loads).from_config(
                config, trust_remote_code=source.trust_remote_code
            )
    except Exception:  # loading it says why; what cannot be built on this device is loaded as before
        return
    check_built(source.source, model, weights_of(Path(source.path)))


def refused(error: BaseException, what: str) -> InputError:
    """One sentence for what a library raised: its own panics are no ``Exception``. An interrupt is raised again."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, InputError)):
        raise error
    return InputError(f"{what}: {_first_line(error)}.")


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, or an :class:`InputError` with the reason why it cannot be loaded."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if source.gguf_file:
        options["gguf_file"] = source.gguf_file
    with quiet(), contextlib.nullcontext(source.path) if source.gguf_file else _readable(source) as path:
        if not source.gguf_file:
            check_tokenizer(source.source, Path(source.path))
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, **options)
            tokenizer.name_or_path = source.path
            _check_special(source.source, tokenizer)
            return tokenizer
        except BaseException as error:
            raise _unreadable(f"No tokenizer can be loaded from {source.source}", source, error) from error


def _check_special(source: str, tokenizer: Any) -> None:
    for name in ("model_max_length", "bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or value < 0):
            raise InputError(
                f"The tokenizer of {source} has {name} {value!r:.100}, which is no number: correct its "
                "tokenizer_config.json."
            )


def tokenizer_rules(tokenizer: Any) -> dict[str, Any] | None:
    """What tokenizer.json says of a fast tokenizer but how it pads and cuts batches; None for a slow one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    return {k: v for k, v in parse_json(backend.to_str()).items() if k not in ("padding", "truncation")}


def load_image_processor(source: ModelSource) -> Any:
    """The model's image processor, or an error with the reason why it cannot be loaded."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            "Reading images needs pillow: pip install 'nbl-export[vision]'."
        ) from None
    from transformers import AutoImageProcessor

    if not (Path(source.path) / PREPROCESSOR).is_file():
        raise InputError(
            f"{source.source} has no {PREPROCESSOR}, which says how its images are scaled: add the one that the "
            "model was trained with."
        )
    with quiet():
        try:
            return AutoImageProcessor.from_pretrained(source.path, trust_remote_code=source.trust_remote_code)
        except BaseException as error:
            raise _unreadable(
                f"No image processor can be loaded from {source.source}", source, error
            ) from error


def _unreadable(what: str, source: ModelSource, error: BaseException) -> InputError:
    if "trust_remote_code" in str(error) and not source.trust_remote_code:
        return InputError(
            f"{source.source} comes with code of its own, which runs only where you say so at this command: read the "
            f".py files in {source.path}, then give --trust-remote-code."
        )
    return refused(error, what)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:300]


def fast_dtype() -> str:
    """The dtype in which this machine runs a model fastest: bfloat16 if the processor supports it, else float32."""
    import torch

    def supported(private: str) -> bool:
        return bool(getattr(torch.cpu, private, lambda: False)())

    # torch 2.13 has a public function for this; earlier releases have only these.
    bf16 = supported("_is_amx_tile_supported") or supported("_is_avx512_bf16_supported")
    return "bfloat16" if bf16 else "float32"


def in_precision(model: torch.nn.Module, dtype: str) -> torch.nn.Module:
    """A copy of ``model`` with its weights in ``dtype`` (float16 …), as transformers would load it.

    Buffers that are not part of a checkpoint (rotary frequencies) stay in their precision.
    """
    import copy

    import torch

    converted = copy.deepcopy(model).to(getattr(torch, dtype))
    for module, original in zip(converted.modules(), model.modules(), strict=True):
        for name in original._non_persistent_buffers_set:
            buffer = original._buffers[name]
            module._buffers[name] = None if buffer is None else buffer.clone()
    return converted
