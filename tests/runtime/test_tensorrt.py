"""An engine in place of the GPU's own: what it loads, what it computes, and where its caches are."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbl_export.engine.library import Gpu
from nbl_export.engine.manifest import load_manifest
from nbl_export.errors import BuildError, InputError
from nbl_export.linearize.swap import linearized
from nbl_export.runtime import tensorrt as module
from nbl_export.runtime.stream import PastStream
from nbl_export.runtime.tensorrt import EngineStream, load_engine
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.verify.parity.figures import gates_for
from tests.finished import LIMITS, Graphs
from tests.fixtures_graph import compare_streams, plan_by_hand, ragged_rows
from tests.runtime.fake_tensorrt import (
    TYPES,
    FakeDevice,
    FakeEngine,
    engine_file,
    loaded_engine,
    tensor_at,
)

ALL = (0, 1, 2, 3, 4)


FORMS = ("concat", "static")


HEADS, DIM = 4, 8


DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


# Rows to run one after another: to the last place of the context, then other sizes, and one size twice.
BATCHES = ((16, 11, 8), (9,), (12,), (12, 16, 13), (10, 16, 11))


STEPS = 7


def poison(loaded: EngineStream) -> None:
    """Fill whatever the cache's buffers held in the last execution with NaN, to their ends."""
    launches = [c.launches[-1] for c in loaded.contexts.values() if c.launches]
    for launch in launches[-1:]:
        for name, address in launch.addresses.items():
            if name.startswith(("past_key_values.", "present.")):
                rows = launch.shapes["input_ids"][0]
                whole = (rows, HEADS, LIMITS.max_context, DIM)
                tensor_at(address, whole, TYPES[loaded.engine.types[name]]).fill_(float("nan"))


def run(stream: EngineStream, lengths: tuple[int, ...], steps: int, seed: int = 0) -> list[np.ndarray]:
    """Logits of a prefill of ``lengths`` and of ``steps`` more tokens."""
    rows = ragged_rows([n + steps for n in lengths], 500, seed)
    found = [stream.prefill([row[:n] for row, n in zip(rows, lengths, strict=True)]).copy()]
    for step in range(steps):
        found.append(stream.decode([int(r[n + step]) for r, n in zip(rows, lengths, strict=True)]).copy())
    return found


@pytest.mark.parametrize(
    ("form", "precision", "layers"),
    [
        ("concat", "fp32", ()),
        ("concat", "fp16", (0, 3)),
        ("concat", "bf16", ALL),
        ("static", "fp32", (0, 3)),
        ("static", "fp16", ALL),
        ("static", "bf16", ()),
    ],
    ids=str,
)
def test_an_engine_computes_what_pytorch_does_batch_after_batch(
    engine_graphs: Graphs, form: str, precision: str, layers: tuple[int, ...]
) -> None:
    """With graph replay, to the end of the context, and with NaN in the buffers that are used again."""
    stream, gates = loaded_engine(engine_graphs(form, precision, layers)), gates_for(DTYPES[precision])
    assert stream.kv_layers == tuple(i for i in ALL if i not in layers)
    with linearized(engine_graphs.model, plan_by_hand(engine_graphs.out, layers)):
        for number, lengths in enumerate(BATCHES):
            rows = ragged_rows(lengths, 500, seed=number)
            poison(stream)
            reference = PastStream(TorchDecoder(engine_graphs.model, layers))
            parity = compare_streams(reference, stream, rows, STEPS, gates)
            assert parity.failures() == [], lengths
            assert sum(s.tokens for s in parity.steps) == sum(lengths)
            assert stream.cache()[1].sum(axis=1).tolist() == list(lengths)
    assert not any(context.errors for context in stream.contexts.values())
    device: Any = stream.device
    assert (device.count("replay") > 0) == (form == "static")


def test_static_decode_is_recorded_after_its_first_step_and_then_replayed(engine_graphs: Graphs) -> None:
    stream: Any = loaded_engine(engine_graphs("static"))
    device = stream.device
    first = [("run", "prefill"), ("run", "decode"), ("capture", "decode")]
    for lengths in ((4, 9), (6,), (3, 2, 1)):
        device.events.clear()
        found = run(stream, lengths, 5, seed=3)
        assert [event for event in device.events if event[0] != "zeros"] == [*first, *["replay"] * 4]
        # A replay that read the inputs of the recorded step would answer alike.
        assert not any(np.array_equal(a, b) for a, b in itertools.pairwise(found[1:]))
    # As many rows again: everything lies where it did.
    device.events.clear()
    run(stream, (5, 4, 9), 5)
    assert [event for event in device.events if event[0] != "zeros"] == [first[0], *["replay"] * 5]


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_fit_is_refused_and_changes_nothing(engine_graphs: Graphs, form: str) -> None:
    stream, tokens = loaded_engine(engine_graphs(form)), np.arange(3, 13, dtype=np.int32)
    device: Any = stream.device
    stream.prefill([tokens[:9], tokens[:4]])
    with pytest.raises(InputError, match=r"4 rows are more than the engine was built for \(max_batch 3\)"):
        stream.prefill([tokens[:2]] * 4)
    with pytest.raises(InputError, match=r"10 tokens in a row are more .* \(max_seq 9\)"):
        stream.prefill([tokens[:1], tokens])
    for step in range(7):
        stream.decode([step, step])
    executed = len(device.events)
    with pytest.raises(InputError, match="context of 16 tokens is full"):
        stream.decode([1, 1])
    assert len(device.events) == executed
    assert stream.prefill([tokens[:2]]).shape == (2, 512)


@pytest.mark.parametrize(("form", "name"), [("static", "write_indices"), ("concat", "attention_mask")])
def test_a_failing_context_is_an_error_of_its_profile(engine_graphs: Graphs, form: str, name: str) -> None:
    rows = ragged_rows((4, 2), 500)
    loaded = loaded_engine(engine_graphs(form))
    loaded.contexts["prefill"].refused.add(name)
    shape = r"\(2,\)" if form == "static" else r"\(2, 4\)"
    with pytest.raises(InputError, match=f"prefill profile does not take {name} of shape {shape}"):
        loaded.prefill(rows)
    assert not loaded.contexts["prefill"].launches
    for profile in ("prefill", "decode"):
        loaded = loaded_engine(engine_graphs(form))
        loaded.contexts[profile].broken = True
        with pytest.raises(BuildError, match=f"failed to run its {profile} profile"):
            run(loaded, (4, 2), 1)


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


Installed = tuple[FakeLibrary, Path, FakeDevice]


@pytest.fixture
def installed(
    engine_graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Installed]:
    """A library in place of the real one, an engine file that it loads, and a GPU to load it on."""

    def install(name: str = "tensorrt", **changes: Any) -> Installed:
        graph, device, library = engine_graphs("static", "fp16", (0, 3)), FakeDevice(), FakeLibrary(name)
        path = engine_file(graph, tmp_path / "model.engine", **changes)
        library.engine = FakeEngine(graph, load_manifest(path), device)
        monkeypatch.setitem(sys.modules, name, library)
        monkeypatch.setattr(module, "find_gpu", lambda: L4)
        return library, path, device

    return install


def test_a_context_for_each_profile_and_an_engine_that_runs(installed: Callable[..., Installed]) -> None:
    library, path, device = installed()
    stream = load_engine(path, device)
    assert library.given == [path.read_bytes()]
    assert stream.engine is library.engine and stream.device is device
    assert list(stream.contexts) == ["prefill", "decode"]
    for index, name in enumerate(("prefill", "decode")):
        context = stream.contexts[name]
        assert context.chosen == (index, device.stream) and context.profile.name == name
        assert context.config is None
    assert stream.contexts["prefill"] is not stream.contexts["decode"]
    assert stream.kv_layers == (1, 2, 4)
    assert stream.prefill([np.arange(3, 8)]).shape == (5, 512)
    for token in range(3):
        stream.decode([token])
    assert device.count("capture") == 1 and device.count("replay") == 2


def test_rtx_captures_by_itself(installed: Callable[..., Installed]) -> None:
    """It compiles kernels while it runs; a recording of ours would keep the ones it began with."""
    _, path, device = installed("tensorrt_rtx", **RTX)
    stream = load_engine(path, device)
    assert [c.config.cuda_graph_strategy for c in stream.contexts.values()] == ["whole", "whole"]
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
