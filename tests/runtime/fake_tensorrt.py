"""A TensorRT engine for the CPU: the real interface, raw addresses and all, over an ONNX graph in ONNX Runtime.

A context keeps the shapes and addresses it is told, holds them to its profile and to the memory that the
device has really given out, and on execution reads its inputs there, runs the graph and writes the outputs
there. It is as strict as the real library, and as blind: whatever lies at an address is taken for the tensor.
"""

from __future__ import annotations

import ctypes
import functools
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch.multiprocessing.reductions import StorageWeakRef

from nbl_export.engine.manifest import Limits, Manifest, NetworkFacts, NetworkTensor, Profile, profiles
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import save_in_precision, trace
from nbl_export.files import sha256_of_file
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import precision_of
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.runtime.session import session
from nbl_export.runtime.tensorrt import Device, LoadedEngine
from tests.fixtures_engine import save_manifest
from tests.fixtures_graph import plan_by_hand, ragged_rows

TYPES = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT64": torch.int64}
_ONNX = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT64: "INT64",
}
LIMITS = Limits(max_batch=3, max_seq=9, max_context=16)
Shapes = dict[str, tuple[int, ...]]


# graphs ------------------------------------------------------------------------------------------


class Graphs:
    """Decoder graphs of stories260K in every form and precision, each made when first asked for."""

    def __init__(self, model: torch.nn.Module, out: Path, folder: Path) -> None:
        self.model, self.out, self.folder = model, out, folder

    def __call__(self, form: str, precision: str = "fp32", layers: Sequence[int] = ()) -> Path:
        """The graph without the attention of ``layers``; read only."""
        name = "-".join([form, precision, *map(str, layers)])
        path = self.folder / name / "model.onnx"
        if path.is_file():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        if layers:
            rewrite_file(self(form, precision), plan_by_hand(self.out, layers), path)
        elif precision != "fp32":
            rows = ragged_rows((24, 17), 500, seed=1)
            save_in_precision(load_graph(self(form)), path, precision_of(precision), rows)
        elif form == "concat":
            return self.out / "baseline" / "model.onnx"
        else:
            save_graph(trace(self.model, FORMS[form]), path)
        return path


@functools.cache
def graphs_of(model: torch.nn.Module, out: Path) -> Graphs:
    """The graphs of the finished run ``out``, shared by all tests of a session."""
    return Graphs(model, out, out.with_name("engine-graphs"))


def manifest_of(path: Path, limits: Limits = LIMITS, role: str = "linearized", **changes: Any) -> Manifest:
    """The manifest that an engine of the graph at ``path`` would have."""
    proto = onnx.load(str(path), load_external_data=False)
    metadata = {p.key: p.value for p in proto.metadata_props}
    constants = {tensor.name for tensor in proto.graph.initializer}
    given = [value for value in proto.graph.input if value.name not in constants]
    inputs, outputs = (_tensors(values, limits) for values in (given, proto.graph.output))
    pairs = sum(t.name.startswith("past_key_values.") for t in inputs) // 2
    shapes = {v.name: _dims(v) for v in given}
    types_found = {t.dtype for t in inputs} - {"INT64"} or {"FLOAT"}
    fields: dict[str, Any] = {
        "role": role,
        "library": "tensorrt",
        "library_version": "10.16.0",
        "ahead_of_time": False,
        "capabilities": ("SM89",),
        "gpu": "NVIDIA L4",
        "precision": {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}[types_found.pop()],
        "kv_cache": "static" if "write_indices" in shapes else "concat",
        "limits": limits,
        "profiles": profiles(shapes, limits),
        "kv_layers": tuple(json.loads(metadata.get("nbl_export.kv_layers", str(list(range(pairs)))))),
        "linear_layers": (),
        "attention": "fused" if pairs else "none",
        "network": NetworkFacts(pairs, pairs, 0, inputs, outputs, {}),
        "hashes": {},
        "build_seconds": 1.0,
        "size": 3 << 20,
        "created_by": "tests",
    }
    return Manifest(**{**fields, **changes})


def _dims(value: Any) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _tensors(values: Any, limits: Limits) -> tuple[NetworkTensor, ...]:
    known = {"max_sequence_length": limits.max_context}

    def shape(value: Any) -> tuple[int, ...]:
        return tuple(d if isinstance(d, int) else known.get(d, -1) for d in _dims(value))

    return tuple(NetworkTensor(v.name, _ONNX[v.type.tensor_type.elem_type], shape(v)) for v in values)


# device ------------------------------------------------------------------------------------------


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


# engine ------------------------------------------------------------------------------------------


@dataclass
class Launch:
    """One execution as it was bound."""

    profile: str
    shapes: Shapes
    addresses: dict[str, int]


@dataclass
class FakeContext:
    """An execution context. ``refused`` inputs and ``broken`` are failures to provoke."""

    engine: FakeEngine
    config: Any = None
    profile: Profile | None = None
    shapes: Shapes = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    broken: bool = False

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        known = self.engine.manifest.profiles
        self.calls.append(("profile", index, stream))
        self.profile = known[index] if 0 <= index < len(known) else None
        return self.profile is not None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None and isinstance(shape, tuple) and all(type(d) is int for d in shape)
        self.calls.append(("shape", name, shape))
        if name not in self.profile.shapes or name in self.refused:
            return False
        low, _, high = self.profile.shapes[name]
        fits = len(shape) == len(low) and all(a <= d <= b for a, d, b in zip(low, shape, high, strict=True))
        if fits:
            self.shapes[name] = shape
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert type(address) is int
        self.calls.append(("address", name, address))
        self.addresses[name] = address
        return name in self.engine.types

    def execute_async_v3(self, stream: int) -> bool:
        self.calls.append(("execute", stream))
        if self.broken:
            return False
        assert self.profile is not None
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
        error = self.engine.run(launch)
        if error:
            self.errors.append(error)
        return not error


class FakeEngine:
    """The graph at ``path`` as a deserialized engine."""

    device_memory_size_v2 = 12345

    def __init__(self, path: Path, manifest: Manifest, device: FakeDevice) -> None:
        self.path, self.manifest, self.device = path, manifest, device
        self.session = session(path)
        network = manifest.network
        self.types = {t.name: t.dtype for t in (*network.inputs, *network.outputs)}
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
        spans = {}
        for name, shape in shapes.items():
            size = math.prod(shape) * TYPES[self.types[name]].itemsize
            address = launch.addresses.get(name)
            if not address:
                return f"{name} has no address"
            if not self.device.owns(address, size):
                return f"{name} of {size} bytes lies outside the memory that is held"
            spans[name] = (address, address + size)
        for output in outputs:
            self._check_alias(output.name, spans, {i.name for i in inputs})
        feeds = {i.name: _array(self._at(i.name, launch, shapes).clone()) for i in inputs}
        names = [o.name for o in outputs]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            assert array.shape == shapes[name], name
            self._at(name, launch, shapes).copy_(torch.from_numpy(array))
        return None

    def _at(self, name: str, launch: Launch, shapes: Shapes) -> torch.Tensor:
        return tensor_at(launch.addresses[name], shapes[name], TYPES[self.types[name]])

    def _check_alias(self, output: str, spans: Mapping[str, tuple[int, int]], inputs: set[str]) -> None:
        """A static cache is one buffer, read and written; nothing else may be written where it is read."""
        past = output.replace("present", "past_key_values")
        for name, (start, end) in spans.items():
            if name == output:
                continue
            if self.manifest.kv_cache == "static" and name == past and name in inputs:
                assert spans[output] == (start, end), f"{output} is not where {name} is"
            else:
                apart = end <= spans[output][0] or spans[output][1] <= start
                assert apart or start == end, f"{output} overlaps {name}"


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    # The session's stand-in for a half graph takes float32.
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def loaded_engine(
    path: Path, limits: Limits = LIMITS, device: FakeDevice | None = None, **changes: Any
) -> LoadedEngine:
    """The graph at ``path`` as if loaded on a GPU: one context for each profile."""
    manifest, device = manifest_of(path, limits, **changes), device or FakeDevice()
    engine = FakeEngine(path, manifest, device)
    contexts = {}
    for index, profile in enumerate(manifest.profiles):
        contexts[profile.name] = context = engine.create_execution_context()
        assert context.set_optimization_profile_async(index, 0)
    return LoadedEngine(manifest, engine, contexts, device)


def engine_file(path: Path, target: Path, limits: Limits = LIMITS, **changes: Any) -> Path:
    """A file in place of a serialized engine of the graph at ``path``, with its manifest beside it."""
    target.write_bytes(b"serialized " + path.read_bytes())
    hashes = {"engine": sha256_of_file(target), "onnx": sha256_of_file(path)}
    save_manifest(
        target, manifest_of(path, limits, **{"size": target.stat().st_size, "hashes": hashes, **changes})
    )
    return target
