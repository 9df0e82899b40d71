"""Candidates: a graph in ONNX Runtime, a TensorRT engine, a model in PyTorch; all by the same few calls.

A :class:`Candidate` makes a :class:`Prompt` for each cell, a number of rows and of tokens in each. What it needs beyond
that (a session, a copy of the model) is made when it is first asked for, and kept from cell to cell.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nbl_export.batch.rows import Inputs
from nbl_export.errors import NblError
from nbl_export.runtime.ort import OrtModel
from nbl_export.runtime.prompts import OrtPrompt, timed_row
from nbl_export.runtime.session import CPU, CUDA, require_onnxruntime
from nbl_export.verify.speed.ceiling import graph_cost
from nbl_export.verify.speed.race import timed
from nbl_export.verify.speed.values import CandidateInfo, GraphCost

if TYPE_CHECKING:
    import torch

    from nbl_export.runtime.tensorrt import EngineStream

_DEVICES = {CPU: "cpu", CUDA: "cuda"}
TIMED_STEPS = 16  # the most decode steps between two prefills: a static cache has that much room
# Steps per timed decode round, averaged: one token is too short to time.
DECODE_STEPS = 8
# Idle threads of one session must not spin on the cores while another is timed.
_CONFIG = {"session.force_spinning_stop": "1"}


class Prompt(Protocol):
    """A candidate in one cell: a prefill from an empty cache, then steps of one token, each finished on return."""

    def prefill(self) -> None: ...

    def rewind(self) -> None:
        """Have the cache as the prompt alone fills it."""

    def step(self) -> None: ...

    def memory_bytes(self) -> int:
        """Bytes of cache and work space, as far as the runtime tells."""


# A cell of so many tokens in so many rows (context, batch); raises what its runtime raises where it cannot be.
Make = Callable[[int, int], Prompt]
# The same of a graph that is loaded.
RunGraph = Callable[[OrtModel, int, int], Prompt]


@dataclass(frozen=True)
class Candidate:
    """Who is timed: its name, how a cell of it is made, the name of its own base, its graph and what that costs."""

    name: str
    make: Make
    base: str | None = None
    graph: Path | None = None
    cost: GraphCost | None = None

    @property
    def info(self) -> CandidateInfo:
        return CandidateInfo(self.name, self.base, self.cost)


# one round ----------------------------------------------------------------------------------------


def prefill_seconds(prompt: Prompt) -> tuple[float, ...]:
    """Seconds of one prefill: the time to the first token."""
    return (timed(prompt.prefill),)


def decode_seconds(prompt: Prompt, steps: int = DECODE_STEPS) -> tuple[float, ...]:
    """Seconds of each of a few decode steps in a row, after the prompt."""
    prompt.rewind()
    prompt.step()  # what whoever ran before left in the caches is not this one's time
    return tuple(timed(prompt.step) for _ in range(steps))


# who there is -------------------------------------------------------------------------------------


def decoder_prompt(provider: str = CPU) -> RunGraph:
    """What runs a cell of a decoder graph in a session."""
    return lambda model, context, batch: OrtPrompt(model, context, TIMED_STEPS, _DEVICES[provider], batch)


class OrtGraph:
    """The graph at ``path`` in ONNX Runtime, its cache kept on the device; ``run`` makes a cell of it.

    The session is ``kept`` from cell to cell, or made anew in each.

    Called, it raises :class:`NblError` if this machine has no such ``provider``.
    """

    def __init__(
        self, path: Path, provider: str = CPU, run: RunGraph | None = None, kept: bool = True
    ) -> None:
        self._path, self._provider, self._run = path, provider, run or decoder_prompt(provider)
        self._kept = kept

    @cached_property
    def model(self) -> OrtModel:
        return self._loaded()

    def _loaded(self) -> OrtModel:
        if self._provider not in require_onnxruntime().get_available_providers():
            raise NblError(f"onnxruntime has no {self._provider} here")
        return OrtModel(self._path, _CONFIG, self._provider, rounded=False)

    def __call__(self, context: int, batch: int = 1) -> Prompt:
        return self._run(self.model if self._kept else self._loaded(), context, batch)


def graph_candidate(
    name: str,
    path: Path,
    base: str | None = None,
    provider: str = CPU,
    run: RunGraph | None = None,
    kept: bool = True,
) -> Candidate:
    """The graph at ``path`` in ONNX Runtime (``kept``: see :class:`OrtGraph`), with what it costs."""
    return Candidate(name, OrtGraph(path, provider, run, kept), base, path, graph_cost(path))


@dataclass
class Anew:
    """One candidate in a cell that is made for each round and gone after it, where not all find room at once."""

    make: Make
    context: int
    batch: int
    bytes: int = 0

    def measured(self, measure: Callable[[Prompt], tuple[float, ...]]) -> tuple[float, ...]:
        prompt = self.make(self.context, self.batch)
        prompt.prefill()  # the first run of a session is not as fast as the others
        found = measure(prompt)
        self.bytes = prompt.memory_bytes()
        return found

    def memory_bytes(self) -> int:
        return self.bytes


class EncoderPass:
    """An encoder graph with a batch to time."""

    def __init__(self, model: OrtModel, inputs: Inputs) -> None:
        self._session, self._feeds = model.session, model.interface.named(inputs)

    def prefill(self) -> None:
        self._session.run(None, self._feeds)

    def rewind(self) -> None: ...

    def step(self) -> None:
        """There is no token after the batch."""

    def memory_bytes(self) -> int:
        return 0


class EnginePrompt:
    """An engine; its logits stay on the device, as they would in use."""

    def __init__(self, stream: EngineStream, context: int, batch: int = 1) -> None:
        self._stream, self._rows = stream, [timed_row(context)] * batch

    def prefill(self) -> None:
        self._stream.prefill_on_device(self._rows)
        self._stream.device.synchronize()

    def rewind(self) -> None:
        self.prefill()

    def step(self) -> None:
        self._stream.decode_on_device([1] * len(self._rows))
        self._stream.device.synchronize()

    def memory_bytes(self) -> int:
        return self._stream.cache_bytes + self._stream.workspace_bytes


class LlamaCppPrompt:
    """A GGUF file in llama.cpp, with the attention, the cache and the batches that it chooses itself."""

    def __init__(self, path: Path, context: int, batch: int = 1) -> None:
        from nbl_export.runtime.llama_cpp import LlamaCppStream

        self._context, self._rows = context, [timed_row(context)] * batch
        self._stream = LlamaCppStream(path, batch, context + TIMED_STEPS, defaults=True)
        weakref.finalize(self, self._stream.close)

    def prefill(self) -> None:
        self._stream.read(self._rows)

    def rewind(self) -> None:
        self._stream.forget(self._context)

    def step(self) -> None:
        self._stream.decode([1] * len(self._rows))

    def memory_bytes(self) -> int:
        return self._stream.cache_bytes


class OpenVinoPrompt:
    """A folder in OpenVINO, with the precisions of products and cache that it chooses itself."""

    def __init__(self, path: Path, context: int, batch: int = 1) -> None:
        from nbl_export.runtime.openvino import OpenVinoStream

        self._rows = [timed_row(context)] * batch
        self._stream = OpenVinoStream(path, defaults=True)

    def prefill(self) -> None:
        self._stream.prefill_last(self._rows)

    def rewind(self) -> None:
        self.prefill()  # states are not cut

    def step(self) -> None:
        self._stream.decode([1] * len(self._rows))

    def memory_bytes(self) -> int:
        return 0  # it does not say


class TorchPrompt:
    """PyTorch with transformers' own cache; ``forward`` is the model, or a compiled form of it."""

    def __init__(
        self,
        model: torch.nn.Module,
        context: int,
        batch: int = 1,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        import torch

        from nbl_export.models.layers import accepted_arguments
        from nbl_export.models.weights import device_of

        self._model, self._forward = model, model if forward is None else forward
        self._device = device_of(model)
        row = torch.from_numpy(timed_row(context).astype(np.int64))
        self._rows = row.repeat(batch, 1).to(self._device)
        self._one = self._rows[:, :1]
        self._last = accepted_arguments(model, logits_to_keep=1)
        self._cache: Any = None
        self._steps = 0

    def prefill(self) -> None:
        self._cache, self._steps = None, 0
        self._run(self._rows)

    def rewind(self) -> None:
        if self._steps:
            self._cache.crop(-self._steps)  # the last tokens go
        self._steps = 0

    def step(self) -> None:
        self._run(self._one)
        self._steps += 1

    def _run(self, ids: torch.Tensor) -> None:
        import torch

        from nbl_export.models.compat import cache_argument

        with torch.inference_mode():
            argument = {cache_argument(self._model): self._cache} if self._cache is not None else {}
            output = self._forward(input_ids=ids, use_cache=True, **argument, **self._last)
        self._cache = output[cache_argument(self._model)]
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def memory_bytes(self) -> int:
        return sum(
            t.numel() * t.element_size()
            for layer in self._cache.layers
            for t in (layer.keys, layer.values)
            if t is not None
        )
