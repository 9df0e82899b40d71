"""Loading an engine: what is checked before and after the library is asked, with a library that only notes."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.engine.library import Gpu
from nbl_export.engine.manifest import load_manifest
from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.runtime import tensorrt as module
from nbl_export.runtime.tensorrt import Device, EngineStream, load_engine
from tests.runtime.fake_tensorrt import FakeDevice, FakeEngine, Graphs, engine_file, graphs_of

L4 = Gpu("NVIDIA L4", "8.9")
RTX = {"library": "tensorrt-rtx", "ahead_of_time": True, "capabilities": ("SM86", "SM89"), "gpu": None}


class FakeLibrary(types.ModuleType):
    """``tensorrt`` or ``tensorrt_rtx`` as far as loading asks for it; ``engine`` is what it deserializes."""

    CudaGraphStrategy = types.SimpleNamespace(DISABLED="disabled", WHOLE_GRAPH_CAPTURE="whole")

    class Logger:
        ERROR = 2

        def __init__(self, severity: int) -> None:
            assert severity == self.ERROR

    def __init__(self, name: str, version: str = "10.16.0") -> None:
        super().__init__(name)
        self.__version__ = version
        self.engine: FakeEngine | None = None
        self.given: list[bytes] = []

    def Runtime(self, logger: Any) -> Any:
        assert isinstance(logger, self.Logger)

        def deserialize(data: bytes) -> FakeEngine | None:
            self.given.append(data)
            return self.engine

        return types.SimpleNamespace(deserialize_cuda_engine=deserialize)


@pytest.fixture(scope="module")
def graphs(stories_model: Any, stories_out: Path) -> Graphs:
    return graphs_of(stories_model, stories_out)


Installed = tuple[FakeLibrary, Path, FakeDevice]


@pytest.fixture
def installed(graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Installed]:
    """A library in place of the real one, an engine file that it loads, and a GPU to load it on."""

    def install(name: str = "tensorrt", **changes: Any) -> Installed:
        graph, device, library = graphs("static", "fp16", (0, 3)), FakeDevice(), FakeLibrary(name)
        path = engine_file(graph, tmp_path / "model.engine", **changes)
        library.engine = FakeEngine(graph, load_manifest(path), device)
        monkeypatch.setitem(sys.modules, name, library)
        monkeypatch.setattr(module, "find_gpu", lambda: L4)
        return library, path, device

    return install


def test_a_context_for_each_profile_and_an_engine_that_runs(installed: Callable[..., Installed]) -> None:
    library, path, device = installed()
    loaded = load_engine(path, device)
    assert library.given == [path.read_bytes()]
    assert loaded.engine is library.engine and loaded.device is device
    assert list(loaded.contexts) == ["prefill", "decode"]
    for index, name in enumerate(("prefill", "decode")):
        context = loaded.contexts[name]
        assert context.calls == [("profile", index, device.stream)] and context.profile.name == name
        assert context.config is None
    assert loaded.contexts["prefill"] is not loaded.contexts["decode"]
    stream = EngineStream(loaded)
    assert stream.kv_layers == (1, 2, 4)
    assert stream.prefill([np.arange(3, 8)]).shape == (5, 512)
    for token in range(3):
        stream.decode([token])
    assert device.count("capture") == 1 and device.count("replay") == 2


def test_rtx_captures_by_itself(installed: Callable[..., Installed]) -> None:
    """It compiles kernels while it runs; a recording of ours would keep the ones it began with."""
    _, path, device = installed("tensorrt_rtx", **RTX)
    loaded = load_engine(path, device)
    assert [c.config.cuda_graph_strategy for c in loaded.contexts.values()] == ["whole", "whole"]
    stream = EngineStream(loaded)
    stream.prefill([np.arange(3, 8)])
    for token in range(3):
        stream.decode([token])
    assert device.count("capture") == device.count("replay") == 0


@pytest.mark.parametrize("name", ["logits", "past_key_values.1.value", "write_indices", "present.0.key"])
def test_an_engine_of_other_types_than_its_network_is_refused(
    installed: Callable[..., Installed], name: str
) -> None:
    library, path, device = installed()
    assert library.engine is not None
    before, library.engine.types[name] = library.engine.types[name], "BF16"
    with pytest.raises(BuildError, match=rf"{name} is BF16, the network it was built from {before}"):
        load_engine(path, device)
    assert not library.engine.contexts


def test_an_engine_that_the_library_does_not_load(installed: Callable[..., Installed]) -> None:
    library, path, device = installed()
    library.engine = None
    with pytest.raises(
        InputError, match=r"tensorrt 10\.16\.0 does not load .*model\.engine: build the engine"
    ):
        load_engine(path, device)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("how", ["no context", "no profile"])
def test_a_context_that_cannot_be_had(
    installed: Callable[..., Installed], monkeypatch: pytest.MonkeyPatch, how: str, failing: int
) -> None:
    library, path, device = installed()
    assert library.engine is not None
    real, made = library.engine.create_execution_context, []

    def create(*arguments: Any) -> Any:
        made.append(real(*arguments))
        if len(made) - 1 != failing:
            return made[-1]
        monkeypatch.setattr(made[-1], "set_optimization_profile_async", lambda *_: False)
        return made[-1] if how == "no profile" else None

    monkeypatch.setattr(library.engine, "create_execution_context", create)
    profile = ("prefill", "decode")[failing]
    with pytest.raises(BuildError, match=f"no execution context for the {profile} profile"):
        load_engine(path, device)


def test_the_manifest_is_checked_before_the_library_is_asked(
    installed: Callable[..., Installed], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, path, device = installed()
    good = path.read_bytes()
    for bad, why in ((good[:-1] + b"?", "was changed after it was built"), (good[:-5], "truncated")):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=why):
            load_engine(path, device)
    path.write_bytes(good)
    monkeypatch.setattr(module, "find_gpu", lambda: None)
    with pytest.raises(MissingDependencyError, match="no NVIDIA GPU is visible"):
        load_engine(path, device)
    monkeypatch.setattr(module, "find_gpu", lambda: Gpu("NVIDIA T4", "7.5"))
    with pytest.raises(InputError, match=r"built for SM89; NVIDIA T4 has compute capability 7\.5"):
        load_engine(path, device)
    monkeypatch.setattr(module, "find_gpu", lambda: L4)
    library.__version__ = "10.16.1"
    with pytest.raises(InputError, match=r"built by tensorrt 10\.16\.0, installed is 10\.16\.1"):
        load_engine(path, device)
    assert library.given == []


def test_a_cpu_build_of_torch_is_named(
    installed: Callable[..., Installed], monkeypatch: pytest.MonkeyPatch
) -> None:
    library, path, _ = installed()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match="needs a CUDA build of torch") as caught:
        load_engine(path)
    assert caught.value.exit_code == 3 and library.given == []


# the stand-ins themselves ------------------------------------------------------------------------


def test_the_fake_context_is_as_strict_as_the_real_one(graphs: Graphs, tmp_path: Path) -> None:
    device, graph = FakeDevice(), graphs("static")
    engine = FakeEngine(graph, load_manifest(engine_file(graph, tmp_path / "model.engine")), device)
    context = engine.create_execution_context()
    assert not context.set_optimization_profile_async(2, 0) and context.set_optimization_profile_async(1, 0)
    for shape in ((1, 2), (4, 1), (0, 1), (1,), (1, 1, 1)):
        assert not context.set_input_shape("input_ids", shape)
    assert not context.set_input_shape("nothing", (1, 1))
    assert not context.execute_async_v3(0) and "input_ids has no shape" in context.errors[-1]
    held = []
    for tensor in engine.manifest.network.inputs:
        shape = tuple(2 if d < 0 and i == 0 else abs(d) for i, d in enumerate(tensor.shape))
        assert context.set_input_shape(tensor.name, shape)
        dtype = "int64" if tensor.dtype == "INT64" else "float32"
        held.append(device.zeros(shape, dtype))
        context.set_tensor_address(tensor.name, held[-1].data_ptr())
        if tensor.name.startswith("past"):
            present = tensor.name.replace("past_key_values", "present")
            context.set_tensor_address(present, held[-1].data_ptr())
    assert not context.execute_async_v3(0) and "logits has no address" in context.errors[-1]
    context.set_tensor_address("logits", 0)
    assert not context.execute_async_v3(0) and "logits has no address" in context.errors[-1]
    small = device.zeros((2, 1, 511), "float32")
    context.set_tensor_address("logits", small.data_ptr())
    assert not context.execute_async_v3(0) and "outside the memory" in context.errors[-1]
    logits = device.zeros((2, 1, 513), "float32")
    context.set_tensor_address("logits", logits.data_ptr())
    assert context.execute_async_v3(0)
    assert logits.flatten()[: 2 * 512].abs().min() > 0 and not logits.flatten()[2 * 512 :].any()
    assert context.set_input_shape("write_indices", (1,))
    assert not context.execute_async_v3(0) and "batch_size" in context.errors[-1]
    context.set_input_shape("write_indices", (2,))
    held.clear()
    assert not context.execute_async_v3(0) and "outside the memory" in context.errors[-1]
    assert Device("cpu").capture(held.clear) == held.clear
