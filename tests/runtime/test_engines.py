"""An engine in place of the GPU's own: what it loads and computes; sessions of ONNX Runtime."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from nbl_export import machine
from nbl_export.engine.library import Gpu
from nbl_export.engine.manifest import load_manifest
from nbl_export.errors import BuildError, InputError, MissingDependencyError
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import PRECISIONS, to_precision
from nbl_export.linearize.swap import linearized
from nbl_export.packages import pip_line
from nbl_export.report.schema import environment
from nbl_export.runtime import session as sessions
from nbl_export.runtime import tensorrt as module
from nbl_export.runtime.ort import OrtModel, ort_stream
from nbl_export.runtime.session import (
    CPU,
    CUDA,
    fit,
    provider_on,
    require_onnxruntime,
    running_on,
    session,
    session_bytes,
    session_options,
)
from nbl_export.runtime.stream import PastStream
from nbl_export.runtime.tensorrt import EngineStream, load_engine
from nbl_export.runtime.torch import TorchDecoder
from nbl_export.verify.parity.figures import gates_for
from tests.finished import LIMITS, Graphs
from tests.fixtures_graph import compare_streams, plan_by_hand, ragged_rows
from tests.graph.by_hand import parsed
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


# ONNX Runtime ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_half_graph_rounds_and_overflows_on_the_cpu_as_it_says(tmp_path: Path, name: str) -> None:
    """Parity measured on the CPU must be that of the graph, not of a float32 run of it."""
    half = PRECISIONS[name]
    weights = {"table": [[300, 1], [1, 1 / 3]], "up": [[300, 0], [0, 3]], "down": [[2**-10, 0], [0, 1]]}
    model = parsed(
        """g (int64[b,s] input_ids) => (float[b,s,2] logits) {
            e = Gather(table, input_ids)
            h = MatMul(e, up)
            logits = MatMul(h, down)
        }""",
        **{n: np.array(w, np.float32) for n, w in weights.items()},
    )
    to_precision(model, half, {})
    save_graph(model, tmp_path / "model.onnx")
    (found,) = session(tmp_path / "model.onnx").run(["logits"], {"input_ids": np.array([[0, 1]])})
    with np.errstate(over="ignore", invalid="ignore"):
        e, up, down = (
            np.array(w, np.float64).astype(half.dtype.numpy()).astype(np.float64) for w in weights.values()
        )
        h = (e @ up).astype(half.dtype.numpy())
        expected = (h.astype(np.float64) @ down).astype(half.dtype.numpy()).astype(np.float32)
    # 300 · 300 is beyond float16; three times a rounded third is 1 again.
    assert np.isinf(expected[0, 0]) == (name == "fp16") and expected[1, 1] == 1
    assert np.array_equal(found[0], expected, equal_nan=True)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_a_small_session_computes_the_same(tiny_graph: Path, tmp_path: Path, name: str) -> None:
    """Casts of weights are exact wherever they are done; unpacked products may add in another order."""
    path = tmp_path / "model.onnx"
    model = load_graph(tiny_graph)
    to_precision(model, PRECISIONS[name], {})
    save_graph(model, path)
    rows = ragged_rows((9, 4), 260)
    assert session_bytes(path) == (2 if name == "fp32" else 3) * sum(
        f.stat().st_size for f in tmp_path.iterdir()
    )
    usual, small = (ort_stream(path, 16, small=of).prefill(rows) for of in (False, True))
    assert np.abs(small - usual).max() <= (1e-5 if name == "fp32" else 0.05) * np.abs(usual).max()


_GROWTH = """
import sys
from pathlib import Path
import numpy as np
from nbl_export.runtime.session import session

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("Anonymous")).split()[1])

before = anonymous()
loaded = session(Path(sys.argv[1]), small=sys.argv[2] == "small")
after = anonymous()
(y,) = loaded.run(None, {"x": np.ones((3, 1024), dtype=np.float32)})
assert np.isfinite(y).all()
print(max(after, anonymous()) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for anonymous memory")
@pytest.mark.parametrize(("of", "least", "most"), [("small", 0.0, 0.5), ("usual", 1.5, 4.0)])
def test_the_weights_of_a_small_session_stay_in_their_file(
    tmp_path: Path, of: str, least: float, most: float
) -> None:
    """In units of the file, of 48 MiB in bfloat16: the usual session has them all in float32."""
    generator = np.random.default_rng(0)
    weights = {
        f"w{i}": (generator.standard_normal((1024, 1024)) / 32).astype(ml_dtypes.bfloat16) for i in range(24)
    }
    products = "\n".join(f"h{i + 1} = MatMul(h{i}, w{i})" for i in range(24))
    text = f"g (float[3,1024] x) => (float[3,1024] y) {{ h0 = Cast<to = 16>(x)\n{products}\ny = Cast<to = 1>(h24) }}"
    _, data = save_graph(parsed(text, **weights), tmp_path / "model.onnx")
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, str(tmp_path / "model.onnx"), of],
        capture_output=True,
        text=True,
        check=True,
    )
    assert least < int(done.stdout) / data.stat().st_size < most


def test_missing_onnxruntime_is_named_with_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=re.escape(pip_line("cpu"))) as caught:
        require_onnxruntime()
    assert caught.value.exit_code == 3
    with pytest.raises(MissingDependencyError):
        session(Path("any.onnx"))


def test_graphs_run_in_cuda_where_onnxruntime_has_it(
    tiny_graph: Path, tmp_path: Path, cuda_sessions: list[Any]
) -> None:
    """On the device's GPU, without TF32; what names a provider runs there, and a half graph rounds as it says."""
    cuda = (CUDA, {"device_id": "1", "use_tf32": "0"})
    assert provider_on("cuda:1") == cuda and provider_on("cpu") == provider_on("xpu:0") == CPU
    half = load_graph(tiny_graph)
    to_precision(half, PRECISIONS["fp16"], {})
    save_graph(half, tmp_path / "half.onnx")
    session(tiny_graph)
    with pytest.raises(ZeroDivisionError), running_on("cuda:1"):
        session(tiny_graph)
        OrtModel(tmp_path / "half.onnx")
        session(tiny_graph, provider=CPU)
        session(tiny_graph, provider=CUDA)
        raise ZeroDivisionError
    session(tiny_graph)
    assert cuda_sessions == [[CPU], [cuda, CPU], [cuda, CPU], [CPU], [CUDA, CPU], [CPU]]


def test_sessions_fit_beside_each_other_with_some_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "free_memory", lambda: 100)
    assert fit(90) and fit(50, 40) and not fit(91) and not fit(50, 41)


def test_a_session_has_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As llama.cpp has: not those that `taskset` or a container takes away."""
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {1, 4, 5}, raising=False)
    assert session_options().intra_op_num_threads == machine.cores() == 3
    for quota, allowed in (("max 100000", 3), ("150000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota)
        assert machine.cores() == environment().cores == allowed
