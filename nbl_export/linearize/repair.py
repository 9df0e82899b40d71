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
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbl_export.linearize.adapters import Adapter, weight_digests
from nbl_export.linearize.lmmse import Covariances, FitInput
from nbl_export.linearize.loss import parts
from nbl_export.linearize.plan import LinearLayer
from nbl_export.linearize.swap import AttentionReplacement, replaced
from nbl_export.models.layers import attention_layer, attention_layers, layer_count
from nbl_export.models.resume import beginning_at, inputs_kept

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tokens of a step; rows of text are taken until there are as many.
_STEP_TOKENS = 1024
_MAP_RATE, _UP_RATE, _DOWN_RATE = 12e-3, 16e-3, 3e-3
_WARM_UP = 10
_LAST_RATE = 0.05  # of the rates, at the end of the cosine


@dataclass(frozen=True)
class Repaired:
    """The maps and the adapters, by parameter, after a repair."""

    maps: dict[int, LinearLayer]
    adapters: dict[str, Adapter]


@dataclass
class _TrainedMap:
    """One map: fixed W₀, b₀ and unit, trained V [d, d] and c [d], all float32."""

    w: torch.Tensor
    b: torch.Tensor
    unit: float
    v: torch.Tensor
    c: torch.Tensor

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.w + self.unit * self.v, self.b + self.unit * self.c

    def layer(self) -> LinearLayer:
        with torch.no_grad():
            w, b = self.merged()
        return LinearLayer(w.cpu().numpy(), b.cpu().numpy())


@dataclass
class _TrainedAdapter:
    """A change unit · up · down of the weight that ``module`` multiplies its input by; up [out, r], down [r, in]."""

    module: str
    unit: float
    up: torch.Tensor
    down: torch.Tensor

    def added(self, x: torch.Tensor) -> torch.Tensor:
        low = torch.nn.functional.linear(x, self.down.to(x))
        return torch.nn.functional.linear(low, (self.unit * self.up).to(x))

    def adapter(self, weight: torch.Tensor, transposed: bool) -> Adapter:
        up, down = (t.detach().float().cpu().numpy() for t in (self.unit * self.up, self.down))
        digests = weight_digests(weight.float().cpu().numpy())
        # A convolution of width 1 keeps its weight [in, out].
        return Adapter(down.T.copy(), up.T.copy(), digests) if transposed else Adapter(up, down, digests)


def repair(
    model: torch.nn.Module,
    maps: Mapping[int, LinearLayer],
    covariances: Mapping[int, Covariances],
    fit_input: FitInput,
    tokens: NDArray[np.int32],
    steps: int,
    seed: int,
    rank: int = 0,
    exact: torch.nn.Module | None = None,
    advance: Callable[[int], None] = lambda _steps: None,
) -> Repaired:
    """``maps`` and MLP changes of ``rank`` after ``steps`` of Adam over ``tokens`` [rows, seq], shuffled by ``seed``.

    ``covariances`` are those of each map's input and output on the original model; ``exact`` is the model whose
    weights the changes are of, where ``model`` is a rounded copy of it.
    """
    first = min(maps)
    layer = attention_layer(model, first)
    device = next(model.parameters()).device
    trained = {i: _begin_map(maps[i], covariances[i], device) for i in sorted(maps)}
    adapters = _begin_adapters(model, first, rank, seed)
    groups = [
        {"params": [t for one in trained.values() for t in (one.v, one.c)], "lr": _MAP_RATE},
        {"params": [one.up for one in adapters], "lr": _UP_RATE},
        {"params": [one.down for one in adapters], "lr": _DOWN_RATE},
    ]
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.98), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    rows = max(1, _STEP_TOKENS // tokens.shape[1])
    order = np.random.default_rng(seed).permutation(len(tokens))
    for step in range(steps):
        wanted = order[np.arange(step * rows, (step + 1) * rows) % len(order)]
        ids = torch.from_numpy(tokens[wanted].astype(np.int64)).to(device)
        with torch.no_grad(), inputs_kept(model, [layer]) as kept:
            target = model(input_ids=ids, use_cache=False).logits
        with ExitStack() as stack:
            modules = stack.enter_context(replaced(model, maps, fit_input))
            stack.enter_context(beginning_at(model, first, kept[first]))
            stack.enter_context(_adding(model, adapters))
            for index, one in trained.items():
                _put(modules[index], one)
            logits = model(input_ids=ids, use_cache=False).logits
            loss: torch.Tensor = _Divergence.apply(logits.flatten(0, -2), target.flatten(0, -2))  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        advance(1)
    found = {}
    for adapter in adapters:
        module = (exact or model).get_submodule(adapter.module)
        weight = module.get_parameter("weight")
        found[f"{adapter.module}.weight"] = adapter.adapter(weight, not isinstance(module, torch.nn.Linear))
    return Repaired({index: one.layer() for index, one in trained.items()}, found)


def _begin_map(layer: LinearLayer, c: Covariances, device: torch.device) -> _TrainedMap:
    d = len(layer.b)
    variance_u, variance_v = float(np.trace(c.c_uu)), float(np.trace(c.c_vv))
    unit = math.sqrt(variance_v / (d * variance_u)) if variance_u > 0 else 0.0
    w, b = (torch.from_numpy(array).to(device) for array in (layer.w, layer.b))
    v, bias = (torch.zeros_like(t).requires_grad_(True) for t in (w, b))
    return _TrainedMap(w, b, unit, v, bias)


def _begin_adapters(model: torch.nn.Module, first: int, rank: int, seed: int) -> list[_TrainedAdapter]:
    if not rank:
        return []
    generator = torch.Generator().manual_seed(seed)
    found = []
    for name in mlp_maps(model, first):
        weight = model.get_submodule(name).get_parameter("weight")
        m, n = weight.shape if isinstance(model.get_submodule(name), torch.nn.Linear) else weight.shape[::-1]
        r = min(rank, m, n)
        up = torch.zeros(m, r, device=weight.device, requires_grad=True)
        down = (torch.randn(r, n, generator=generator) / math.sqrt(n)).to(weight.device).requires_grad_(True)
        found.append(_TrainedAdapter(name, float(weight.float().square().mean().sqrt()), up, down))
    return found


def mlp_maps(model: torch.nn.Module, first: int) -> list[str]:
    """The linear maps beside the attention in the blocks from that of attention layer ``first`` on, by their paths."""
    from transformers.pytorch_utils import Conv1D

    layers = {layer.index: layer for layer in attention_layers(model)}
    stack = layers[first].block.rpartition(".")[0]
    found = []
    for index in range(first, layer_count(model)):
        own = layers.get(index)
        if own is None:
            continue  # what else mixes tokens is left as it is
        block, taken = f"{stack}.{index}", (f"{own.attention}.", f"{own.output}.")
        for name, module in model.get_submodule(block).named_modules():
            path = f"{block}.{name}"
            if isinstance(module, (torch.nn.Linear, Conv1D)) and not f"{path}.".startswith(taken):
                found.append(path)
    return found


@contextmanager
def _adding(model: torch.nn.Module, adapters: list[_TrainedAdapter]) -> Iterator[None]:
    with ExitStack() as hooks:
        for one in adapters:

            def add(
                _module: Any, args: Any, output: torch.Tensor, one: _TrainedAdapter = one
            ) -> torch.Tensor:
                return output + one.added(args[0])

            hooks.callback(model.get_submodule(one.module).register_forward_hook(add).remove)
        yield


def _put(module: AttentionReplacement, one: _TrainedMap) -> None:
    w, b = one.merged()
    module.weight, module.bias = w.to(module.weight), b.to(module.bias)


def _rate(step: int, steps: int) -> float:
    cosine = 0.5 * (
        1 + math.cos(math.pi * step / max(steps, 1))
    )  # it is asked once even if nothing is to be done
    return min(1.0, (step + 1) / _WARM_UP) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)


class _Divergence(torch.autograd.Function):
    """Mean KL(p ‖ q) of ``target`` and ``logits`` [places, vocab]; its gradient is (q - p) / places.

    Written out in parts: the same by autograd keeps several float32 copies of both.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(logits)
        total = torch.zeros((), device=logits.device)
        for part in parts(len(logits)):
            log_p, log_q = (torch.log_softmax(t[part].float(), dim=-1) for t in (target, logits))
            p = log_p.exp()
            total += (p * (log_p - log_q)).sum()
            gradient[part] = ((log_q.exp_() - p) / len(logits)).to(gradient)
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient), None
