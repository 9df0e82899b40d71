"""Run transformers without its output, with functions of it replaced, and with the arguments that a model takes."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

CACHE_ARGUMENTS = ("cache", "past_key_values")  # the KV cache, today and before


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
def replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    """Within the block, ``owner`` (a module or a class) has ``function`` under that name."""
    original = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, original)


def accepts(model: torch.nn.Module, argument: str) -> bool:
    """Whether the forward function of ``model`` has an argument with that name."""
    return argument in inspect.signature(model.forward).parameters


def accepted_arguments(model: torch.nn.Module, **arguments: Any) -> dict[str, Any]:
    """Those of ``arguments`` that the forward function of ``model`` has: not every family takes positions."""
    return {name: value for name, value in arguments.items() if accepts(model, name)}


def cache_argument(model: torch.nn.Module) -> str:
    """The name of the KV cache argument of ``forward``: it was renamed within transformers 5."""
    new, old = CACHE_ARGUMENTS
    return new if accepts(model, new) else old
