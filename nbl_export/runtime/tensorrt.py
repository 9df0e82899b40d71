"""A TensorRT engine as a :class:`~nbl_export.runtime.stream.Stream`: device buffers, bindings, both profiles.

A static cache is one buffer per layer and side, bound as past and as present, so that nothing is copied. Its
decode step keeps every shape and address and runs as a CUDA graph. A growing cache has two buffers, which
alternate as past and present and are large enough for the longest context.

Everything that uses the GPU goes through :class:`Device` (torch) and an execution context, so that the rest can
be tested on the CPU with a recording context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch import (
    BOOL,
    F32,
    I64,
    MASK,
    POSITIONS,
    TOKENS,
    WRITE_INDICES,
    left_padded,
    prefix_mask,
    prefix_padded,
)
from nbl_export.engine.library import find_gpu
from nbl_export.engine.manifest import DECODE, PREFILL, Manifest, check_runs, load_manifest
from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.runtime.stream import KV, Stream

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


class Device:
    """GPU memory and a CUDA stream, through torch. ``name`` is a torch device."""

    def __init__(self, name: str = "cuda") -> None:
        if name == "cuda" and not torch.cuda.is_available():
            raise MissingDependencyError(
                "Running an engine needs a CUDA build of torch: install torch from its CUDA index."
            )
        self.name = name
        self._stream: Any = torch.cuda.Stream() if name == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def stream(self) -> int:
        """The handle of the stream for an execution context."""
        return int(self._stream.cuda_stream) if self._stream else 0

    def zeros(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        with self._on_stream():
            return torch.zeros(tuple(shape), dtype=getattr(torch, dtype), device=self.name)

    def clear(self, tensor: torch.Tensor) -> None:
        """Set ``tensor`` to zero."""
        with self._on_stream():
            tensor.zero_()

    def put(self, target: torch.Tensor, array: NDArray[Any]) -> None:
        """Copy a host array into ``target``."""
        with self._on_stream():
            target.copy_(torch.from_numpy(np.ascontiguousarray(array)), non_blocking=True)

    def get(self, tensor: torch.Tensor) -> Any:
        """``tensor`` as a host array; half precision becomes float32."""
        with self._on_stream():
            return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy().copy()

    def _on_stream(self) -> AbstractContextManager[Any]:
        # All work is ordered on one stream, the one the engine runs on.
        return torch.cuda.stream(self._stream) if self._stream else nullcontext()

    def synchronize(self) -> None:
        if self._stream:
            self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work`` captured as a CUDA graph to replay; ``work`` itself without a GPU."""
        if self._stream is None:
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            work()

        def replay() -> None:
            with self._on_stream():
                graph.replay()

        return replay


def load_engine(path: Path, device: Device | None = None) -> EngineStream:
    """Load the engine at ``path`` on this machine's GPU, with an execution context for each profile.

    Its manifest is checked first (:mod:`nbl_export.engine.manifest`), then the dtypes reported by the engine.
    Raises :class:`InputError`, :class:`MissingDependencyError` or :class:`BuildError`.
    """
    manifest = load_manifest(path)
    library = check_runs(manifest, find_gpu())
    device = device or Device()
    trt = library.module
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise InputError(f"{library} does not load {path}: build the engine again on this machine.")
    for tensor in (*manifest.network.inputs, *manifest.network.outputs):
        found = engine.get_tensor_dtype(tensor.name).name
        if found != tensor.dtype:
            raise BuildError(
                f"{path}: {tensor.name} is {found}, the network it was built from {tensor.dtype}: build the "
                "engine again."
            )
    contexts, how = {}, []
    if library.ahead_of_time:  # it captures by itself
        how = [engine.create_runtime_config()]
        how[0].cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    for index, profile in enumerate(manifest.profiles):
        context = engine.create_execution_context(*how)
        if context is None or not context.set_optimization_profile_async(index, device.stream):
            raise BuildError(
                f"{path}: no execution context for the {profile.name} profile: free GPU memory, or build for a "
                "shorter --max-context."
            )
        contexts[profile.name] = context
    device.synchronize()
    return EngineStream(manifest, engine, contexts, device, not library.ahead_of_time, runtime)


class EngineStream(Stream):
    """A deserialized engine as a stream of ragged rows; logits and cache stay on the device until requested.

    ``contexts`` has one for each profile. ``captures`` says whether the decode step is captured into a CUDA graph here;
    it is False if the library does that itself. ``runtime`` must live as long as the engine.
    """

    def __init__(
        self,
        manifest: Manifest,
        engine: Any,
        contexts: dict[str, Any],
        device: Device,
        captures: bool = True,
        runtime: Any = None,
    ) -> None:
        self.manifest, self.device, self.kv_layers = manifest, device, manifest.kv_layers
        self.contexts, self.engine, self.captures, self._runtime = contexts, engine, captures, runtime
        network = manifest.network
        self._inputs = {t.name: t for t in network.inputs}
        self._outputs = {t.name: t for t in network.outputs}
        self._past = [n for n in self._inputs if n.startswith("past_key_values.")]
        self.static = manifest.kv_cache == "static"
        self._vocab = self._outputs["logits"].shape[-1]
        # By profile: the tensors bound to a decode step outlive the next prefill, as its CUDA graph needs.
        self._bound: dict[str, dict[str, torch.Tensor]] = {PREFILL: {}, DECODE: {}}
        self._batch = 0
        self._replay: Callable[[], None] | None = None

    @property
    def memory_bytes(self) -> int:  # type: ignore[override]  # of this batch
        """Bytes of the cache's buffers on the device, and of the scratch memory, which every context allocates."""
        buffers = {t.data_ptr(): t for name in self._past for t in self._buffers[name]} if self._batch else {}
        return sum(t.nbytes for t in buffers.values()) + len(self.contexts) * int(
            self.engine.device_memory_size_v2
        )

    # Stream ----------------------------------------------------------------------------------
    def prefill(self, rows: Sequence[NDArray[Any]]) -> F32:
        logits: F32 = self.device.get(self.prefill_on_device(rows))[self._mask.astype(bool)]
        return logits

    def decode(self, tokens: Sequence[int]) -> F32:
        logits: F32 = self.device.get(self.decode_on_device(tokens))
        return logits[:, 0]

    def cache(self) -> tuple[Sequence[KV], BOOL]:
        width = self.manifest.limits.max_context if self.static else self._length
        sides = [self.device.get(self._view(name, width, self._turn)) for name in self._past]
        real = prefix_mask(self._lengths, width) if self.static else self._mask.astype(bool)
        return list(zip(sides[::2], sides[1::2], strict=True)), real

    def time_prefill(self, rows: Sequence[NDArray[Any]]) -> None:
        self.prefill_on_device(rows)
        self.device.synchronize()

    def time_step(self, tokens: Sequence[int]) -> None:
        self.decode_on_device(tokens)
        self.device.synchronize()

    # on the device ---------------------------------------------------------------------------
    def prefill_on_device(self, rows: Sequence[NDArray[Any]]) -> torch.Tensor:
        """Run ``rows`` from an empty cache: logits [rows, longest, vocab], including padding."""
        self._check_fits(rows)
        self._allocate(len(rows))
        self._lengths = np.array([len(r) for r in rows], dtype=np.int64)
        ids, self._mask, positions = (prefix_padded if self.static else left_padded)(rows)
        self._length = 0
        self._feed(PREFILL, ids, positions, np.zeros_like(self._lengths))
        self._run(PREFILL, ids.shape[1])
        self._length = ids.shape[1]
        return self._bound[PREFILL]["logits"]

    def decode_on_device(self, tokens: Sequence[int]) -> torch.Tensor:
        """One more token for each row: logits [rows, 1, vocab]."""
        longest = int(np.max(self._lengths)) if self.static else self._length
        if longest + 1 > self.manifest.limits.max_context:
            raise InputError(
                f"The engine's context of {self.manifest.limits.max_context} tokens is full: build it for more."
            )
        ids = np.array(tokens, dtype=np.int64)[:, None]
        self._mask = np.concatenate([self._mask, np.ones_like(ids)], axis=1)
        self._feed(DECODE, ids, self._lengths[:, None], self._lengths)
        if self._replay is not None:
            self._replay()
        else:
            self._run(DECODE, 1)
            if self.static and self.captures:
                # Shapes and addresses stay the same from now on; the first step was the warm-up for the capture.
                self._replay = self.device.capture(lambda: self._execute(DECODE))
        self._length += 1
        self._lengths = self._lengths + 1
        return self._bound[DECODE]["logits"]

    def _check_fits(self, rows: Sequence[NDArray[Any]]) -> None:
        limits, longest = self.manifest.limits, max(len(r) for r in rows)
        for what, found, name, most in (
            ("rows", len(rows), "max_batch", limits.max_batch),
            ("tokens in a row", longest, "max_seq", limits.max_seq),
        ):
            if found > most:
                raise InputError(
                    f"{found} {what} are more than the engine was built for ({name} {most}): build it for more."
                )

    # buffers and bindings --------------------------------------------------------------------
    def _allocate(self, batch: int) -> None:
        if batch == self._batch:
            for pair in self._buffers.values():
                for buffer in pair:
                    self.device.clear(buffer)  # masked values must be finite
            return
        self._batch, self._turn, self._replay = batch, 0, None
        self._bound = {PREFILL: {}, DECODE: {}}
        self._buffers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for name in self._past:
            size = int(np.prod(self._shape(name, self.manifest.limits.max_context)))
            dtype = _DTYPES[self._inputs[name].dtype]
            first = self.device.zeros([size], dtype)
            self._buffers[name] = (first, first if self.static else self.device.zeros([size], dtype))

    def _shape(self, name: str, length: int) -> tuple[int, ...]:
        _, heads, _, dim = self._inputs[name].shape
        return (self._batch, heads, length, dim)

    def _view(self, name: str, length: int, turn: int) -> torch.Tensor:
        """One of the buffers of a cache, as [batch, heads, length, head_dim]."""
        shape = self._shape(name, length)
        return self._buffers[name][turn][: int(np.prod(shape))].view(shape)

    def _feed(self, profile: str, ids: I64, positions: I64, start: I64) -> None:
        bound = self._bound[profile]
        fed = {TOKENS: ids, MASK: self._mask, POSITIONS: positions, WRITE_INDICES: start}
        for name, array in fed.items():
            if name not in self._inputs:
                continue  # a graph without attention has no position input
            if name not in bound or bound[name].shape != array.shape:
                bound[name] = self.device.zeros(array.shape, _DTYPES[self._inputs[name].dtype])
            self.device.put(bound[name], array)

    def _run(self, profile: str, sequence: int) -> None:
        """Bind all tensors for a pass over ``sequence`` tokens and execute it."""
        context, bound = self.contexts[profile], self._bound[profile]
        shape = (self._batch, sequence, self._vocab)
        if "logits" not in bound or bound["logits"].shape != shape:
            bound["logits"] = self.device.zeros(shape, _DTYPES[self._outputs["logits"].dtype])
        capacity = self.manifest.limits.max_context
        before, after = (capacity, capacity) if self.static else (self._length, self._length + sequence)
        other = 1 - self._turn
        for name in self._past:
            bound[name] = self._view(name, before, self._turn)
            bound[name.replace("past_key_values", "present")] = self._view(name, after, other)
        for name, tensor in bound.items():
            if name in self._inputs and not context.set_input_shape(name, tuple(tensor.shape)):
                raise InputError(
                    f"The engine's {profile} profile does not take {name} of shape {tuple(tensor.shape)}."
                )
            # An empty tensor has no address; the address of its buffer is used.
            owner = self._buffers[name][self._turn] if name in self._past else tensor
            context.set_tensor_address(name, owner.data_ptr())
        self._execute(profile)
        self._turn = other

    def _execute(self, profile: str) -> None:
        if not self.contexts[profile].execute_async_v3(self.device.stream):
            raise BuildError(f"The engine failed to run its {profile} profile: build the engine again.")
