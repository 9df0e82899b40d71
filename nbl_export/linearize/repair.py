"""A short distillation: the linearized model learns the original's predictions.

The loss is KL(original ‖ linearized) of the next token, on calibration text. Adam trains a change of each map in the
unit that its layer suggests,

    W = W₀ + u V        b = b₀ + u c        u² = E‖y - μ_y‖² / (d E‖x - μ_x‖²)

and, if a rank is given, a change U D of that rank of every MLP weight from the first linear layer's block on, in units
of that weight's root mean square. So one set of learning rates suits every layer and every model. All changes begin at
nil and are merged at the end: a repaired map is a map like any other, a changed weight a weight. Everything else is
frozen.

Whitening the maps' inputs as well, so that every direction has one unit, was tried and is worse: it gives the
directions that hardly vary, and of which a step of 1,024 tokens knows little, as much weight as the others.

Frozen weights stay as the model has them; what is trained, and Adam's two moments of it, is in float32. A model of more
than 2 GiB is never in memory as a whole: the backward pass computes each block again, to the same bits, for a third
more time, and has the weights and activations of one block. A step then reads the weights at most three times: for the
original, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.pytorch_utils import Conv1D

from nbl_export.batch import are_media
from nbl_export.blocks import Block, layer_of
from nbl_export.errors import InputError
from nbl_export.linearize.lmmse import Covariances
from nbl_export.linearize.loss import chunks
from nbl_export.linearize.plan import Adapter, LinearLayer, Replacement, weight_digests
from nbl_export.linearize.swap import LinearReplacement, replaced
from nbl_export.models.candidates import blocks_of
from nbl_export.models.layers import attention_layers, block_stack, hidden_size, layer_count
from nbl_export.models.walk import first_needed, recomputed, recording_inputs, starting_at
from nbl_export.models.weights import device_of, held, resident, room, size, streams, weights_like
from nbl_export.processes import Checkpoint, saving_to
from nbl_export.progress import Listener, Silent
from nbl_export.settings.choices import FitInput
from nbl_export.tensorfile import load_tensors, save_tensors

# Tokens of a step; rows of text are taken until there are as many.
_STEP_TOKENS = 1024
_MAP_RATE, _UP_RATE, _DOWN_RATE = 12e-3, 16e-3, 3e-3
_WARM_UP = 10
_LAST_RATE = 0.05  # of the rates, at the end of the cosine
# What the original computes up to the first and the last layer is kept from epoch to epoch, within this memory.
_KEPT_BYTES = 4 * 2**30
# A model of more bytes is trained through block by block, also where it has room: its activations take as much again.
_WHOLE_BYTES = 2 * 2**30
_CHECKPOINT = "nbl-export/repair/2"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # as Adam names them


@dataclass(frozen=True)
class Repaired:
    """The maps and the adapters, by parameter, after a repair."""

    layers: dict[Block, LinearLayer]
    adapters: dict[str, Adapter]


@dataclass(frozen=True)
class Distillation:
    """What is repaired and how: maps in ``model`` that read ``fit_input``, on ``tokens`` [rows, seq].

    ``replaced`` is what stands in the place of attentions and MLPs, of which maps are repaired; ``covariances`` are
    those of each map's input and output on the original model. ``steps`` of Adam over the rows,
    shuffled by ``seed``, which may also change the MLPs by ``rank``; ``exact`` is the model whose weights those
    changes are of, where ``model`` is a rounded copy of it. ``identity`` stands for all these in a checkpoint.
    """

    model: torch.nn.Module
    replaced: Mapping[Block, Replacement]
    covariances: Mapping[Block, Covariances]
    fit_input: FitInput
    tokens: NDArray[np.int32]
    steps: int
    seed: int
    rank: int = 0
    exact: torch.nn.Module | None = None
    identity: str = ""

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """Token rows [rows, seq] int64 of a step each, the same in every epoch.

        What is kept of one is what it would compute again, to the bit.
        """
        rows = max(1, _STEP_TOKENS // self.tokens.shape[1])
        order = np.random.default_rng(self.seed).permutation(len(self.tokens))
        return [
            torch.from_numpy(self.tokens[order[at : at + rows]].astype(np.int64))
            for at in range(0, len(order), rows)
        ]


class _TrainedMap:
    """One map: fixed W₀, b₀ and unit, trained V [d, d] and c [d], all float32."""

    def __init__(self, layer: LinearLayer, c: Covariances, device: torch.device) -> None:
        variance_u, variance_v = float(np.trace(c.c_uu)), float(np.trace(c.c_vv))
        self.unit = math.sqrt(variance_v / (len(layer.b) * variance_u)) if variance_u > 0 else 0.0
        self.w, self.b = (torch.from_numpy(array).to(device) for array in (layer.w, layer.b))
        self.v, self.c = (torch.zeros_like(t).requires_grad_(True) for t in (self.w, self.b))

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.w + self.unit * self.v, self.b + self.unit * self.c

    def layer(self) -> LinearLayer:
        return LinearLayer(*(tensor.detach().cpu().numpy() for tensor in self.merged()))

    def hook(self, module: LinearReplacement, hooks: ExitStack) -> None:
        """Each pass through ``module`` merges the map anew: it is not kept for the backward pass."""
        device, dtype = module.weight.device, module.weight.dtype

        def merge(*_: Any) -> None:
            module.weight, module.bias = (tensor.to(device, dtype) for tensor in self.merged())

        def drop(*_: Any) -> None:
            del module.weight, module.bias

        hooks.callback(module.register_forward_pre_hook(merge).remove)
        hooks.callback(module.register_forward_hook(drop, always_call=True).remove)


class _TrainedAdapter:
    """A change unit · up · down of the weight that a module multiplies its input by; up [out, r], down [r, in]."""

    def __init__(self, model: torch.nn.Module, path: str, rank: int, generator: torch.Generator) -> None:
        module = model.get_submodule(path)
        with held(model, [path]):
            weight = module.get_parameter("weight")
            self.unit = float(weight.float().square().mean().sqrt())
        # A convolution of width 1 keeps its weight [in, out].
        self.path, self.transposed = path, not isinstance(module, torch.nn.Linear)
        m, n = weight.shape[::-1] if self.transposed else weight.shape
        r, device = min(rank, m, n), device_of(model)
        self.up = torch.zeros(m, r, device=device, requires_grad=True)
        down = torch.randn(r, n, generator=generator) / math.sqrt(n)
        self.down = down.to(device).requires_grad_(True)

    def add(self, _module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        low = torch.nn.functional.linear(args[0], self.down.to(args[0]))
        return output + torch.nn.functional.linear(low, (self.unit * self.up).to(args[0]))

    def adapter(self, exact: torch.nn.Module) -> Adapter:
        """The change of the weight of the ``exact`` model."""
        up, down = (t.detach().float().cpu().numpy() for t in (self.unit * self.up, self.down))
        with held(exact, [self.path]):
            weight = exact.get_submodule(self.path).get_parameter("weight")
            digests = weight_digests(weight.float().cpu().numpy())
        return Adapter(down.T.copy(), up.T.copy(), digests) if self.transposed else Adapter(up, down, digests)


def repair(
    task: Distillation, checkpoint: Checkpoint | None = None, listener: Listener | None = None
) -> Repaired:
    """The maps and the changes of the MLPs after the ``task``.

    A ``checkpoint`` of another identity is ignored; what goes on from one ends bit for bit as if it had never
    stopped. Raises ``KeyboardInterrupt`` after an interrupt, its work saved.
    """
    listener = listener or Silent()
    with resident(task.model, room(task.model)):
        training = _Training(task)
        done = training.resume(checkpoint, listener)
        batches, steps = task.batches, task.steps
        original = _Original(task, training.first, keeping=steps - done > len(batches))
        with (
            listener.task("Repairing", steps, "steps", done) as shown,
            saving_to(checkpoint, lambda path: training.save(path, done)) as between,
        ):
            while done < steps:
                number = done % len(batches)
                ids = batches[number].to(training.device)
                training.step(ids, *original(number, ids), _rate(done, steps))
                done += 1
                shown.advance(1)
                between()
        return training.result()


def _rate(step: int, steps: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / _WARM_UP) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)


class _Original:
    """What the model computes of the batches as it is: the states at the input of layer ``first``, and the logits.

    If ``keeping``, and there is room for the states of all tokens, a batch asked for again is begun at the last layer.
    """

    def __init__(self, task: Distillation, first: int, keeping: bool) -> None:
        self._model = model = task.model
        self._first = first_needed(model, first)
        self._last = first_needed(model, attention_layers(model)[-1].index)
        states = task.tokens.size * hidden_size(model) * weights_like(model).element_size()
        self._keeping = keeping and 2 * states <= _KEPT_BYTES
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, number: int, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States [rows, seq, d] and logits [rows, seq, vocab] of batch ``number``, the tokens ``ids`` [rows, seq]."""
        with torch.no_grad():
            if number in self._kept:
                first, last = (states.to(ids.device) for states in self._kept[number])
                with starting_at(self._model, self._last, last):
                    return first, self._model(input_ids=ids, use_cache=False).logits
            with recording_inputs(self._model, [self._first, self._last]) as states:
                logits = self._model(input_ids=ids, use_cache=False).logits
            if self._keeping:
                self._kept[number] = states[self._first].cpu(), states[self._last].cpu()
            return states[self._first], logits


class _Training:
    """The changes of maps and MLP weights in training, and their optimizer."""

    def __init__(self, task: Distillation) -> None:
        self._task, model = task, task.model
        self.first, self.device = layer_of(min(task.replaced)), device_of(model)
        self._maps = {
            i: _TrainedMap(one, task.covariances[i], self.device)
            for i, one in sorted(task.replaced.items())
            if isinstance(one, LinearLayer)
        }
        generator = torch.Generator().manual_seed(task.seed)
        paths = mlp_maps(model, self.first, task.replaced) if task.rank else []
        self._adapters = [_TrainedAdapter(model, path, task.rank, generator) for path in paths]
        groups: list[dict[str, Any]] = [
            {"params": [t for one in self._maps.values() for t in (one.v, one.c)], "rate": _MAP_RATE},
            {"params": [one.up for one in self._adapters], "rate": _UP_RATE},
            {"params": [one.down for one in self._adapters], "rate": _DOWN_RATE},
        ]
        self._optimizer = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.98), eps=1e-12)
        self._trained: list[torch.Tensor] = [t for group in groups for t in group["params"]]

    def step(self, ids: torch.Tensor, states: torch.Tensor, target: torch.Tensor, rate: float) -> None:
        """One step on tokens [rows, seq] int64, at ``rate`` of the learning rates.

        ``states`` and ``target`` are the original's of these tokens: the input of the first layer, and the logits,
        which are overwritten.
        """
        model = self._task.model
        with ExitStack() as stack:
            modules = stack.enter_context(replaced(model, self._task.replaced, self._task.fit_input))
            stack.enter_context(starting_at(model, first_needed(model, self.first), states))
            for one in self._adapters:
                stack.callback(model.get_submodule(one.path).register_forward_hook(one.add).remove)
            for index, trained in self._maps.items():
                trained.hook(modules[index], stack)
            if streams(model) or size(model) > _WHOLE_BYTES:
                stack.enter_context(recomputed(model, self.first))
            self._loss(ids, target).backward()  # type: ignore[no-untyped-call]
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["rate"]
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _loss(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = self._task.model(input_ids=ids, use_cache=False).logits
        # What is predicted in the place of an image's embedding nobody reads.
        words = torch.nn.functional.pad(~are_media(ids[:, 1:]), (0, 1), value=True)
        both = (logits, target) if words.all() else (logits[words][None], target[words][None])
        return divergence(*(t.flatten(0, -2) for t in both))

    def result(self) -> Repaired:
        """What was learned; the adapters are of the exact model's weights."""
        exact = self._task.exact or self._task.model
        layers = {index: one.layer() for index, one in self._maps.items()}
        return Repaired(layers, {f"{one.path}.weight": one.adapter(exact) for one in self._adapters})

    def save(self, path: Path, done: int) -> None:
        """Write what is trained, and Adam's moments of it, after ``done`` steps."""
        tensors = {}
        for number, tensor in enumerate(self._trained):
            moments = self._optimizer.state[tensor]
            for name, array in {"value": tensor, **{m: moments[m] for m in _MOMENTS}}.items():
                tensors[f"{number}.{name}"] = array.detach().cpu().numpy()
        metadata = {"identity": self._task.identity, "steps": str(done)}
        save_tensors(path, _CHECKPOINT, tensors, metadata)

    def resume(self, checkpoint: Checkpoint | None, listener: Listener) -> int:
        """Go on from the ``checkpoint``, if it is there and of this task; the steps that are done."""
        if checkpoint is None or not checkpoint.path.exists():
            return 0
        try:
            tensors, metadata = load_tensors(checkpoint.path, _CHECKPOINT, "")
        except InputError:
            listener.note(f"The checkpoint {checkpoint.path.name} is damaged and was ignored.")
            return 0
        if metadata.get("identity") != self._task.identity:
            return 0
        steps = int(metadata["steps"])
        for number, tensor in enumerate(self._trained):
            value, *moments = (
                torch.from_numpy(tensors[f"{number}.{name}"]).to(self.device) for name in ("value", *_MOMENTS)
            )
            tensor.data.copy_(value)
            named = dict(zip(_MOMENTS, moments, strict=True))
            self._optimizer.state[tensor] = {"step": torch.tensor(float(steps)), **named}
        listener.note(f"The repair goes on from a checkpoint at {steps} steps.")
        return steps


def mlp_maps(model: torch.nn.Module, first: int, linear: Collection[Block] = ()) -> list[str]:
    """The linear maps beside the attention from layer ``first`` on, by their paths; not those of ``linear`` MLPs."""
    layers = {layer.index: layer for layer in attention_layers(model)}
    gone = [path for one in blocks_of(model) if one.index in linear for path in (one.module, one.output)]
    found = []
    for index in range(first, layer_count(model)):
        own = layers.get(index)
        if own is None:
            continue  # what else mixes tokens is left as it is
        block = f"{block_stack(model)[0]}.{index}"
        taken = tuple(f"{path}." for path in (own.module, own.output, *gone))
        for name, module in model.get_submodule(block).named_modules():
            path = f"{block}.{name}"
            if isinstance(module, (torch.nn.Linear, Conv1D)) and not f"{path}.".startswith(taken):
                found.append(path)
    return found


def divergence(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean KL(p ‖ q) of ``target`` and ``logits`` [places, vocab]; its gradient is (q - p) / places.

    Worked out in parts: the same by autograd keeps several float32 copies of both. The gradient is written over the
    ``target``.
    """
    mean: torch.Tensor = _Divergence.apply(logits, target)  # type: ignore[no-untyped-call]
    return mean


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=logits.device)
        for part in chunks(len(logits)):
            log_p, log_q = (torch.log_softmax(t[part].float(), dim=-1) for t in (target, logits))
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            target[part] = ((log_q.exp_() - p) / len(logits)).to(target)
        ctx.save_for_backward(target)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(grads[0].to(gradient)), None
