"""A TensorRT engine for the CPU: the real interface, raw addresses and all, over an ONNX graph in ONNX Runtime.

A context keeps the shapes and addresses it is told, holds them to its profile and to the memory that the
device has really given out, and on execution reads its inputs there, runs the graph and writes the outputs
there. It is as strict as the real library, and as blind: whatever lies at an address is taken for the tensor.
"""

from __future__ import annotations

import ctypes
import functools
import math
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from nbl_export.engine.manifest import Limits, Manifest
from nbl_export.files import sha256_of_file
from nbl_export.runtime.session import session
from nbl_export.runtime.tensorrt import Device, EngineStream
from tests.finished import LIMITS, manifest_of, save_manifest

TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64}
Shapes = dict[str, tuple[int, ...]]


class FakeDevice(Device):
    """Host memory that knows what it has given out, and CUDA graphs that repeat what they recorded."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.events: list[Any] = []  # ("zeros", shape), ("run" or "capture", profile), "replay"
        self.recording: list[Callable[[], bool]] | None = None
        self._given: list[tuple[int, int, StorageWeakRef]] = []

    def zeros(self, shape: Sequence[int], dtype: str) -> torch.Tensor:
        tensor = super().zeros(shape, dtype)
        storage = tensor.untyped_storage()
        self._given.append((storage.data_ptr(), storage.nbytes(), StorageWeakRef(storage)))
        self.events.append(("zeros", tuple(shape)))
        return tensor

    def owns(self, address: int, size: int) -> bool:
        """Whether all ``size`` bytes at ``address`` lie in one block that is still held."""
        self._given = [block for block in self._given if not block[2].expired()]
        return any(start <= address and address + size <= start + length for start, length, _ in self._given)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Like CUDA: while recording nothing runs, and a replay knows only what was recorded."""
        self.recording = recorded = []
        try:
            work()
        finally:
            self.recording = None

        def replay() -> None:
            self.events.append("replay")
            assert all(launch() for launch in recorded)

        return replay

    def count(self, what: str) -> int:
        return sum(event == what or event[0] == what for event in self.events)


def tensor_at(address: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The memory at ``address`` as a tensor, not a copy."""
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype)
    raw = (ctypes.c_char * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype, count=count).view(tuple(shape))


@dataclass
class Launch:
    """One execution as it was bound."""

    profile: str
    shapes: Shapes
    addresses: dict[str, int]


class FakeContext:
    """An execution context. ``refused`` inputs and ``broken`` are failures to provoke."""

    def __init__(self, engine: FakeEngine, config: Any) -> None:
        self.engine, self.config, self.chosen, self.profile = engine, config, (-1, -1), None
        self.shapes: Shapes = {}
        self.addresses: dict[str, int] = {}
        self.launches: list[Launch] = []
        self.errors: list[str] = []
        self.refused: set[str] = set()
        self.broken = False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.chosen, self.profile = (index, stream), self.engine.manifest.profiles[index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert isinstance(shape, tuple) and all(type(d) is int for d in shape)
        if name not in self.profile.shapes or name in self.refused:
            return False
        low, _, high = self.profile.shapes[name]
        fits = len(shape) == len(low) and all(a <= d <= b for a, d, b in zip(low, shape, high, strict=True))
        if fits:
            self.shapes[name] = shape
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert type(address) is int
        self.addresses[name] = address
        return name in self.engine.types

    def execute_async_v3(self, stream: int) -> bool:
        if self.broken:
            return False
        launch = Launch(self.profile.name, dict(self.shapes), dict(self.addresses))
        device = self.engine.device
        if device.recording is not None:
            # Work for new shapes is done in the first execution, which must not be a recorded one.
            assert self.launches and self.launches[-1] == launch
            device.events.append(("capture", launch.profile))
            device.recording.append(functools.partial(self._run, launch))
            return True
        device.events.append(("run", launch.profile))
        self.launches.append(launch)
        return self._run(launch)

    def _run(self, launch: Launch) -> bool:
        if error := self.engine.run(launch):
            self.errors.append(error)
        return not error


class FakeEngine:
    """The graph at ``path`` as a deserialized engine."""

    device_memory_size_v2 = 12345

    def __init__(self, path: Path, manifest: Manifest, device: FakeDevice) -> None:
        self.path, self.manifest, self.device, self.session = path, manifest, device, session(path)
        self.types = {t.name: t.dtype for t in (*manifest.network.inputs, *manifest.network.outputs)}
        self.contexts: list[FakeContext] = []

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name=self.types[name])

    def create_runtime_config(self) -> Any:
        return types.SimpleNamespace(cuda_graph_strategy=None)

    def create_execution_context(self, config: Any = None) -> FakeContext:
        self.contexts.append(FakeContext(self, config))
        return self.contexts[-1]

    def run(self, launch: Launch) -> str | None:
        """Compute from memory to memory; returns why it cannot, with nothing written."""
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        sizes: dict[str, int] = {}
        for value in inputs:
            if value.name not in launch.shapes:
                return f"{value.name} has no shape"
            for dim, found in zip(value.shape, launch.shapes[value.name], strict=True):
                if sizes.setdefault(str(dim), found) != found:
                    return f"{value.name} has {found} for {dim}, another input {sizes[str(dim)]}"
        if sizes.get("total_sequence_length", math.inf) < sizes["sequence_length"]:
            return "the mask is shorter than the sequence"
        # The input that says how many has a default, which is a constant here: all.
        sizes["num_logits"] = sizes["sequence_length"]
        shapes = dict(launch.shapes)
        shapes |= {o.name: tuple(sizes[d] if isinstance(d, str) else d for d in o.shape) for o in outputs}
        spans, tensors = {}, {}
        for name, shape in shapes.items():
            dtype, address = TYPES[self.types[name]], launch.addresses.get(name)
            size = math.prod(shape) * dtype.itemsize
            if not address or not self.device.owns(address, size):
                return f"{name} of {size} bytes lies outside the memory that is held"
            spans[name], tensors[name] = (address, address + size), tensor_at(address, shape, dtype)
        # A static cache is one buffer, read and written; nothing else may be written where it is read.
        for output in (o.name for o in outputs):
            start, end = spans[output]
            for name, span in spans.items():
                if self.manifest.kv_cache == "static" and name == output.replace(
                    "present", "past_key_values"
                ):
                    assert span == (start, end), f"{output} is not where {name} is"
                elif name != output and span[0] < span[1]:
                    assert end <= span[0] or span[1] <= start, f"{output} overlaps {name}"
        # The session's stand-in for a half graph takes float32.
        copies = {i.name: tensors[i.name].clone() for i in inputs}
        feeds = {n: (t.float() if t.is_floating_point() else t).numpy() for n, t in copies.items()}
        names = [o.name for o in outputs]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            assert array.shape == shapes[name], name
            tensors[name].copy_(torch.from_numpy(array))
        return None


def loaded_engine(
    path: Path, limits: Limits = LIMITS, device: FakeDevice | None = None, **changes: Any
) -> EngineStream:
    """The graph at ``path`` as an engine that is loaded, with a context for each profile."""
    manifest, device = manifest_of(path, limits, **changes), device or FakeDevice()
    engine, contexts = FakeEngine(path, manifest, device), {}
    for index, profile in enumerate(manifest.profiles):
        contexts[profile.name] = context = engine.create_execution_context()
        context.set_optimization_profile_async(index, 0)
    return EngineStream(manifest, engine, contexts, device)


def engine_file(path: Path, target: Path, limits: Limits = LIMITS, **changes: Any) -> Path:
    """A file in place of a serialized engine of the graph at ``path``, with its manifest beside it."""
    target.write_bytes(b"serialized " + path.read_bytes())
    hashes = {"engine": sha256_of_file(target), "onnx": sha256_of_file(path)}
    known = {"size": target.stat().st_size, "hashes": hashes, **changes}
    save_manifest(target, manifest_of(path, limits, **known))
    return target
