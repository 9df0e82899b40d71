"""The PyTorch reference: the original model with the planned attention modules and MLPs replaced by W and b."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from nbl_export.blocks import Block, Mlp, layer_of
from nbl_export.errors import InputError
from nbl_export.linearize.plan import Adapter, Dropped, Plan, Replacement
from nbl_export.models.candidates import blocks_of
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.layers import BlockModules, block_stack, hidden_size, layer_count
from nbl_export.models.running import hidden_states, plain_attributes
from nbl_export.models.walk import Segment, after_blocks, passing_blocks, walking
from nbl_export.models.weights import held, weights_like
from nbl_export.progress import Listener
from nbl_export.settings.choices import FitInput


class LinearReplacement(torch.nn.Module):
    """Replaces an attention or an MLP: returns W u + b in the same form, and uses no KV cache; zeros if it is dropped.

    With ``fit_input`` ``"residual"``, u is the residual stream, which a forward pre-hook provides.
    ``returns`` is the length of the tuple returned by the original, None for a bare tensor; ``added`` returns the
    argument that the original added to its output.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self,
        layer: Replacement,
        fit_input: FitInput,
        like: torch.Tensor,
        returns: int | None,
        added: Callable[..., torch.Tensor] | None,
        through: str = "",
    ) -> None:
        super().__init__()
        # If the output projection was inside the original, hooks on its path still see y.
        self.through = torch.nn.Identity()
        parent: torch.nn.Module = self
        *outer, last = through.split(".")
        for name in outer:
            parent.add_module(name, torch.nn.Module())
            parent = parent.get_submodule(name)
        if last:
            parent.add_module(last, self.through)
        self.dropped = isinstance(layer, Dropped)
        if not isinstance(layer, Dropped):
            self.register_buffer("weight", torch.from_numpy(layer.w).to(like))
            self.register_buffer("bias", torch.from_numpy(layer.b).to(like))
        self.fit_input = fit_input
        self.returns, self.added = returns, added
        self.residual: torch.Tensor | None = None
        self.result: torch.Tensor | None = None

    def take_residual(self, _block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.residual = hidden_states(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        u = hidden_states(args, kwargs) if self.fit_input == "normed" else self.residual
        assert u is not None
        y: torch.Tensor = (
            torch.zeros_like(u) if self.dropped else torch.nn.functional.linear(u, self.weight, self.bias)
        )
        y = self.through(y)
        self.result = y
        if self.added is not None:
            y = y + self.added(*args, **kwargs)
        return y if self.returns is None else (y, *[None] * (self.returns - 1))


class AttentionReplacement(LinearReplacement):
    """Replaces an attention, and is found as one."""


class MlpReplacement(LinearReplacement):
    """Replaces an MLP, and is found as one."""


class _Given(torch.nn.Module):
    """Replaces the module that writes y, if it is not inside the replaced one: returns what that has computed."""

    def __init__(self, linear: LinearReplacement) -> None:
        super().__init__()
        self._linear = [linear]  # no module of this one

    def forward(self, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        (linear,) = self._linear
        assert linear.result is not None  # which has run before
        result, linear.result = linear.result, None
        return result


@contextmanager
def linearized(model: torch.nn.Module, plan: Plan) -> Iterator[torch.nn.Module]:
    """``model`` with ``plan`` applied, within the block; the original modules are restored afterwards.

    Raises :class:`InputError` if the plan is for a model of another depth or width.
    """
    check_plan(model, plan)
    with replaced(model, plan.replacements, plan.fit_input), adapted(model, plan.adapters):
        yield model


def check_plan(model: torch.nn.Module, plan: Plan) -> None:
    """Raise :class:`InputError` if ``plan`` is for a model of another depth or width."""
    count = layer_count(model)
    if plan.layer_count != count or plan.hidden_size != hidden_size(model):
        raise InputError(
            f"The plan is for {plan.layer_count} layers of width {plan.hidden_size}; this model has "
            f"{count} of width {hidden_size(model)}: run `nbl-export select` for this model."
        )


@contextmanager
def adapted(model: torch.nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """``model`` with the ``adapters``, by parameter name, merged into its weights, within the block."""
    with held(model, adapters), ExitStack() as undo:
        for name, adapter in adapters.items():
            parameter = model.get_parameter(name)
            undo.callback(setattr, parameter, "data", parameter.data)
            change = torch.from_numpy(adapter.change()).to(parameter.device)
            parameter.data = (parameter.data.float() + change).to(parameter.dtype)
        yield


@contextmanager
def replaced(
    model: torch.nn.Module, linear: Mapping[Block, Replacement], fit_input: FitInput
) -> Iterator[dict[Block, LinearReplacement]]:
    """``model`` with each attention and MLP of ``linear`` replaced, within the block.

    The value is the replacement modules by layer.
    """
    # Found by a run of the original, before any is replaced.
    layers = {one.index: one for one in blocks_of(model)}
    modules: dict[Block, LinearReplacement] = {}
    with ExitStack() as undo:
        for index in sorted(linear):
            modules[index], restore = _swap(model, layers[index], linear[index], fit_input)
            undo.callback(restore)
        yield modules


def _swap(
    model: torch.nn.Module, layer: BlockModules[Block], weights: Replacement, fit_input: FitInput
) -> tuple[LinearReplacement, Callable[[], None]]:
    stream, original = model.get_submodule(layer.stream), model.get_submodule(layer.module)
    returns = dummy_run(model).returns[layer.index]
    added = _argument(original, layer.adds) if layer.adds else None
    inside = f"{layer.output}.".startswith(f"{layer.module}.")
    linear = (MlpReplacement if isinstance(layer.index, Mlp) else AttentionReplacement)(
        weights,
        fit_input,
        weights_like(model),
        returns,
        added,
        layer.output[len(layer.module) + 1 :] if inside else "",
    )
    # A block may read attributes of its attention: Gemma 3 of transformers 4 reads `is_sliding`.
    vars(linear).update(plain_attributes(original) | vars(linear))
    new: dict[str, torch.nn.Module] = {layer.module: linear}
    if not inside:
        # What writes y is a separate module, behind an activation of an MLP: it gives what the other has computed.
        new[layer.output] = _Given(linear)
    old = {path: model.get_submodule(path) for path in new}
    hook = new.get(layer.stream, stream).register_forward_pre_hook(linear.take_residual, with_kwargs=True)

    def put(modules: Mapping[str, torch.nn.Module]) -> None:
        for path, module in modules.items():
            parent, name = path.rsplit(".", 1)
            setattr(model.get_submodule(parent), name, module)

    def restore() -> None:
        hook.remove()
        put(old)

    put(new)
    return linear, restore


def _argument(module: torch.nn.Module, name: str) -> Callable[..., torch.Tensor]:
    signature = inspect.signature(module.forward)

    def find(*args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = signature.bind(*args, **kwargs).arguments[name]
        return found

    return find


@dataclass(frozen=True)
class Version:
    """A model that differs from the settled one from the block ``first`` on.

    ``layers`` are all that are linear in it, also before ``first``; ``adapters`` change weights of its blocks, by
    parameter name. A ``change`` is another one, made when the version begins: it must be of the only version that is
    run. Where the states of each row after the last block are known, they are its ``ends``, and no block is run.
    """

    first: int
    layers: Mapping[Block, Replacement] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    change: AbstractContextManager[Any] = field(default_factory=nullcontext)
    ends: Sequence[torch.Tensor] = ()


ORIGINAL = Version(0)


def version_of(model: torch.nn.Module, plan: Plan) -> Version:
    """``model`` with ``plan`` applied; raises :class:`InputError` for a plan of another depth or width."""
    check_plan(model, plan)
    return Version(layer_of(min(plan.chosen, default=0)), plan.replacements, plan.adapters)


def sweep(
    model: torch.nn.Module,
    rows: Sequence[torch.Tensor],
    versions: Sequence[Version],
    fit_input: FitInput,
    settled: Mapping[Block, Replacement] | None = None,
    advance: Callable[[int], None] = lambda _tokens: None,
    listener: Listener | None = None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Row, version and logits [seq, vocab] for each of ``rows`` [seq] int64 and of ``versions``, row after row.

    ``settled`` are the linear layers of the settled model. ``advance`` is called with the tokens of each row,
    and the ``listener`` is told of each block.
    """
    batches = [{"input_ids": row[None]} for row in rows]
    ours = Version(0, settled or {})
    states: list[Any] = [None] * len(batches)
    own: list[list[Any]] = [list(version.ends) for version in versions]
    with torch.inference_mode(), ExitStack() as changes, walking(model) as run:
        for part in passing_blocks(model, listener):
            with run(part) as step:
                for version, there in zip(versions, own, strict=True):
                    if version.ends:
                        continue
                    if not there and version.first < part.stop:
                        there += states
                        changes.enter_context(version.change)
                    if there:
                        with within(model, version, part, fit_input):
                            there[:] = map(step, batches, there)
                if not all(own):
                    with within(model, ours, part, fit_input):
                        states = list(map(step, batches, states))
        with after_blocks(model) as finish:
            for number, batch in enumerate(batches):
                for which, there in enumerate(own):
                    yield number, which, finish(batch, there[number]).logits[0]
                advance(len(rows[number]))


@contextmanager
def within(model: torch.nn.Module, version: Version, part: Segment, fit_input: FitInput) -> Iterator[None]:
    """Within the block, the blocks of ``part`` are those of the ``version``."""
    inside = range(part.start, part.stop)
    layers = {i: layer for i, layer in version.layers.items() if layer_of(i) in inside}
    prefixes = tuple(f"{block_stack(model)[0]}.{index}." for index in inside)
    adapters = {name: one for name, one in version.adapters.items() if name.startswith(prefixes)}
    with replaced(model, layers, fit_input) if layers else nullcontext(), adapted(model, adapters):
        yield
