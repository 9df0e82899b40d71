"""Run a model quietly, with the arguments that it takes, functions replaced, and hooks on its modules."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from nbl_export.errors import InputError
from nbl_export.models.layers import B, BlockModules, language_head


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
    return "cache" if accepts(model, "cache") else "past_key_values"


class Hooks(ExitStack):
    """Hooks on the modules of a ``model``, by path, as long as this is open."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def before(self, path: str, told: Callable[[Any, Any], Any], first: bool = False) -> None:
        """``told`` gets the arguments of the module, and may return others; ``first`` of all its hooks."""
        register = self.model.get_submodule(path).register_forward_pre_hook
        hook = register(lambda _module, args, kwargs: told(args, kwargs), with_kwargs=True, prepend=first)
        self.callback(hook.remove)

    def after(self, path: str, told: Callable[[Any], Any], first: bool = False) -> None:
        """``told`` gets the output of the module, and may return another."""
        register = self.model.get_submodule(path).register_forward_hook
        self.callback(register(lambda _module, _args, output: told(output), prepend=first).remove)


@contextmanager
def logits_at(model: torch.nn.Module, positions: torch.Tensor) -> Iterator[Callable[..., torch.Tensor]]:
    """Within the block, ``model`` makes logits at ``positions`` alone, if its head is a module.

    The value takes the logits of a row, [seq, vocab] or those, and returns those.
    """
    if (head := language_head(model)) is None:
        yield lambda logits: logits[positions]
        return
    hook = head.register_forward_pre_hook(lambda _head, args: (args[0][:, positions], *args[1:]))
    try:
        yield lambda logits: logits
    finally:
        hook.remove()


Observer = Callable[[B, "torch.Tensor", "torch.Tensor", "torch.Tensor"], None]


@contextmanager
def observed(
    model: torch.nn.Module, layers: Sequence[BlockModules[B]], observer: Observer[B]
) -> Iterator[None]:
    """Call ``observer(index, residual, normed, output)`` for each of these blocks in each forward pass.

    ``residual`` is the stream h, ``normed`` the input of the module, ``output`` its output before the residual
    addition; each is [batch, sequence, d], a view of the live activations.
    """

    def keep(args: Any, kwargs: Any, name: str, seen: dict[str, torch.Tensor]) -> None:
        seen[name] = hidden_states(args, kwargs)

    def give(output: Any, layer: BlockModules[B], seen: dict[str, torch.Tensor]) -> None:
        if "normed" not in seen or "residual" not in seen:
            raise InputError(
                f"{type(model).__name__} does not run the block of {layer.named}, the module itself and its output "
                f"once each in this order, but replaces it at run time: this architecture is not supported yet."
            )
        given = (seen.pop("residual"), seen.pop("normed"), states_in(output))
        # Some families have all tokens in one list while they compute an MLP.
        rows = [t.reshape(seen["block"].shape) if getattr(t, "ndim", 0) == 2 else t for t in given]
        observer(layer.index, *rows)

    with Hooks(model) as hooks:
        for layer in layers:
            seen: dict[str, torch.Tensor] = {}
            for name, path in (("block", layer.block), ("residual", layer.stream), ("normed", layer.module)):
                hooks.before(path, partial(keep, name=name, seen=seen))
            hooks.after(layer.output, partial(give, layer=layer, seen=seen))
        yield


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states in the arguments of the ``forward`` of a block or an attention."""
    value: torch.Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    return value


def states_in(output: Any) -> Any:
    """The hidden states in what a block, an attention or an MLP returns."""
    return output[0] if isinstance(output, tuple) else output


def plain_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """The plain attributes of a module that a model may read, as `attention_type`; a replacement needs them too."""
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and not callable(v)}
