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
from nbl_export.models.compat import enable_softcapping, is_transformers_4, readable_folder
from nbl_export.models.source import ModelSource, check_config
from nbl_export.models.tasks import task_named

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
    """The folder of ``source`` with configurations that the installed transformers reads correctly."""
    if source.gguf_file or not is_transformers_4():
        yield source.path
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield str(readable_folder(Path(source.path), Path(scratch) / Path(source.path).name))


def load_model(source: ModelSource) -> torch.nn.Module:
    """The model with the head of its task in float32, ``eval`` mode, without gradients.

    GGUF weights are dequantized. Raises :class:`InputError` if transformers cannot read the model.
    """
    import torch
    import transformers

    task = task_named(source.task)
    options: dict[str, Any] = {"dtype": torch.float32, "trust_remote_code": source.trust_remote_code}
    if source.gguf_file:
        options["gguf_file"] = source.gguf_file
    else:
        options["use_safetensors"] = True
    with quiet(), _readable(source) as path:
        try:
            model, info = getattr(transformers, task.loads).from_pretrained(
                path, output_loading_info=True, **options
            )
        except Exception as error:  # transformers raises almost anything for an unreadable model
            raise _unreadable(f"transformers cannot load {source.source}", source, error) from error
    check_config(source.source, model.config.to_dict())
    missing = sorted(info["missing_keys"])
    if not task.causal and missing and all(key.startswith("pooler.") for key in missing):
        model.pooler, missing = None, []  # saved without one, as sentence-transformers often does
    if missing:
        raise InputError(
            f"{source.source} has no weights for {missing[0]} and {len(missing) - 1} more: download the model again."
        )
    # A dequantized model is an ordinary model, but this attribute would prevent saving it.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.hf_quantizer = None
    enable_softcapping(model)
    loaded: torch.nn.Module = model.eval().requires_grad_(False)
    return loaded


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer, or an :class:`InputError` with the reason why it cannot be loaded."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if source.gguf_file:
        options["gguf_file"] = source.gguf_file
    with quiet(), _readable(source) as path:
        try:
            return AutoTokenizer.from_pretrained(path, **options)
        except Exception as error:
            raise _unreadable(f"No tokenizer can be loaded from {source.source}", source, error) from error


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
        except Exception as error:
            raise _unreadable(
                f"No image processor can be loaded from {source.source}", source, error
            ) from error


def _unreadable(what: str, source: ModelSource, error: Exception) -> InputError:
    if "trust_remote_code" in str(error) and not source.trust_remote_code:
        return InputError(
            f"{source.source} comes with code of its own, which runs only where you say so at this command: read the "
            f".py files in {source.path}, then give --trust-remote-code."
        )
    return InputError(f"{what}: {_first_line(error)}.")


def _first_line(error: Exception) -> str:
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
