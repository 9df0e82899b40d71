"""Make what is timed: a graph in ONNX Runtime, a TensorRT engine, a model in PyTorch, a file of another engine.

A :class:`Candidate` makes a :class:`Prompt` for each cell, a number of rows and of tokens in each. What it needs beyond
that (a session, a copy of the model) is made when it is first asked for, and kept from cell to cell.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.names import NUM_LOGITS_TO_KEEP, WRITE_INDICES
from nbl_export.batch.rows import Inputs
from nbl_export.errors import NblError
from nbl_export.runtime.ort import OrtModel
from nbl_export.runtime.session import CPU, CUDA, require_onnxruntime
from nbl_export.runtime.stream import Stream
from nbl_export.verify.speed.ceiling import graph_cost
from nbl_export.verify.speed.values import CandidateInfo, GraphCost

if TYPE_CHECKING:
    import torch

    from nbl_export.runtime.llama_cpp import LlamaCppStream
    from nbl_export.runtime.tensorrt import EngineStream

TIMED_STEPS = 16  # the most decode steps between two prefills: a static cache has that much room
_DEVICES = {CPU: "cpu", CUDA: "cuda"}
_TOKENS = 32  # distinct tokens in a timed prompt; every vocabulary has these ids
# Idle threads of one session must not spin on the cores while another is timed.
_CONFIG = {"session.force_spinning_stop": "1"}


class Prompt:
    """A candidate in one cell: a prefill from an empty cache, then steps of one token, each finished on return."""

    def prefill(self) -> None:
        raise NotImplementedError

    def rewind(self) -> None:
        """Have the cache as the prompt alone fills it."""
        self.prefill()

    def step(self) -> None: ...

    def memory_bytes(self) -> int:
        """Bytes of cache and work space, as far as the runtime tells."""
        return 0


def timed_row(context: int) -> NDArray[np.int32]:
    """A prompt of ``context`` tokens to time."""
    return (np.arange(context) % _TOKENS).astype(np.int32)


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


class OrtGraph:
    """The graph at ``path`` in ONNX Runtime, its cache kept on the device; ``run`` makes a cell of it.

    The session is ``kept`` from cell to cell, or made anew in each.

    Called, it raises :class:`NblError` if this machine has no such ``provider``.
    """

    def __init__(
        self, path: Path, provider: str = CPU, run: RunGraph | None = None, kept: bool = True
    ) -> None:
        self._path, self._provider, self._kept = path, provider, kept
        self._run = run or (
            lambda *cell: OrtPrompt(cell[0], cell[1], TIMED_STEPS, _DEVICES[provider], cell[2])
        )

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


class OrtPrompt(Prompt):
    """A graph in a session with ``batch`` prompts of ``context`` tokens; an in-place cache has ``room`` more slots.

    Inputs and KV cache stay bound on the device (I/O binding). The cache of the timed decode step is filled by a real
    prefill. A growing cache is bound as the runtime returned it; if the graph can write it in place, one buffer is
    bound as past and as present at once.
    """

    def __init__(self, model: OrtModel, context: int, room: int, device: str = "cpu", batch: int = 1) -> None:
        self.model, self.device = model, device
        # The past input for each present output.
        self._pairs = dict(zip(model.interface.present_names, model.past_names, strict=True))
        # A state is read after it is written, so it has a buffer of its own.
        self._kv = {name for entry in model.interface.cache for name in entry.present}
        one = np.ones((batch, 1), dtype=np.int64)
        ids = one * timed_row(context).astype(np.int64)
        prefill = {"input_ids": ids, "position_ids": one * np.arange(context, dtype=np.int64)}
        step = {"input_ids": one, "position_ids": one * context}
        if model.interface.static:
            prefill[WRITE_INDICES], step[WRITE_INDICES] = one[:, 0] * 0, one[:, 0] * context
        else:
            prefill["attention_mask"] = np.ones_like(ids)
            step["attention_mask"] = np.ones((batch, context + 1), dtype=np.int64)
        # Generation needs the logits of the last position only.
        prefill[NUM_LOGITS_TO_KEEP] = step[NUM_LOGITS_TO_KEEP] = np.array(1, dtype=np.int64)
        self.step_inputs = step
        # What is bound lies in the memory of NumPy's arrays, which not every release of onnxruntime keeps alive.
        self._bound: list[Any] = []
        length = context + room if model.interface.in_place else 0
        empty = model.interface.empty_cache(batch, length, model.cache_dtype)
        self._prefill = self._bind(prefill, {name: self._on_device(array) for name, array in empty.items()})
        self._step: Any = None
        self.past: dict[str, Any] = {}

    def prefill(self) -> None:
        """Run the prompt from an empty cache, and bind the cache that it fills."""
        self._run(self._prefill)
        if not self.past:
            outputs = dict(zip(self.model.output_names, self._prefill.get_outputs(), strict=True))
            self.past = {past: outputs[present] for present, past in self._pairs.items()}
            self._step = self._bind(self.step_inputs, self.past)

    def rewind(self) -> None:
        """Restore the cache as filled by the prompt; nothing to do, since steps do not advance it."""

    def step(self) -> None:
        """Run one token after the prompt; the cache does not advance, so every step costs the same."""
        self._run(self._step)

    def memory_bytes(self) -> int:
        """Bytes of the filled cache."""
        return sum(int(np.prod(v.shape())) for v in self.past.values()) * self.model.cache_dtype.itemsize

    def _bind(self, inputs: Mapping[str, Any], past: Mapping[str, Any]) -> Any:
        binding = self.model.session.io_binding()
        asked = {name: array for name, array in inputs.items() if name == NUM_LOGITS_TO_KEEP}
        for name, array in {**self.model.interface.named(inputs), **asked}.items():
            if name in self.model.interface.inputs:
                self._bound.append(value := self._on_device(array))
                binding.bind_ortvalue_input(name, value)
        for name, value in past.items():
            self._bound.append(value)
            binding.bind_ortvalue_input(name, value)
        for name in self.model.output_names:
            if self.model.interface.in_place and name in self._kv:
                binding.bind_ortvalue_output(name, past[self._pairs[name]])
            else:
                binding.bind_output(name, self.device)
        return binding

    def _run(self, binding: Any) -> None:
        self.model.session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def _on_device(self, array: NDArray[Any]) -> Any:
        return require_onnxruntime().OrtValue.ortvalue_from_numpy(
            np.asarray(array, order="C"), self.device, 0
        )


class EncoderPass(Prompt):
    """An encoder graph with a batch to time; there is no token after it."""

    def __init__(self, model: OrtModel, inputs: Inputs) -> None:
        self._session, self._feeds = model.session, model.interface.named(inputs)

    def prefill(self) -> None:
        self._session.run(None, self._feeds)


class StreamPrompt(Prompt):
    """A stream that computes the last logits of a prefill alone, as in use."""

    def __init__(self, stream: Stream, context: int, batch: int = 1) -> None:
        self.stream, self.rows = stream, [timed_row(context)] * batch

    def prefill(self) -> None:
        self.stream.prefill_last(self.rows)

    def step(self) -> None:
        self.stream.decode([1] * len(self.rows))

    def memory_bytes(self) -> int:
        return self.stream.cache_bytes


class EnginePrompt(StreamPrompt):
    """An engine; its logits stay on the device, as they would in use."""

    stream: EngineStream

    def prefill(self) -> None:
        self.stream.prefill_on_device(self.rows)
        self.stream.device.synchronize()

    def step(self) -> None:
        self.stream.decode_on_device([1] * len(self.rows))
        self.stream.device.synchronize()

    def memory_bytes(self) -> int:
        return self.stream.cache_bytes + self.stream.workspace_bytes


class LlamaCppPrompt(StreamPrompt):
    """A GGUF file in llama.cpp, with the attention, the cache and the batches that it chooses itself."""

    stream: LlamaCppStream

    def __init__(self, path: Path, context: int, batch: int = 1) -> None:
        from nbl_export.runtime.llama_cpp import LlamaCppStream

        super().__init__(LlamaCppStream(path, batch, context + TIMED_STEPS, defaults=True), context, batch)
        weakref.finalize(self, self.stream.close)

    def rewind(self) -> None:
        self.stream.forget(len(self.rows[0]))


def openvino_prompt(path: Path, context: int, batch: int = 1) -> StreamPrompt:
    """A folder in OpenVINO, with the precisions of products and cache that it chooses itself."""
    from nbl_export.runtime.openvino import OpenVinoStream

    return StreamPrompt(OpenVinoStream(path, defaults=True), context, batch)


class TorchPrompt(Prompt):
    """PyTorch with transformers' own cache; ``forward`` is the model, or a compiled form of it."""

    def __init__(
        self,
        model: torch.nn.Module,
        context: int,
        batch: int = 1,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        import torch

        from nbl_export.models.libraries import accepted_arguments
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

        from nbl_export.models.libraries import cache_argument

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
