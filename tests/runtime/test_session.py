"""Sessions of ONNX Runtime: what is refused in words, and that half graphs round on the CPU as they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from nbl_export import machine
from nbl_export.errors import MissingDependencyError
from nbl_export.graph.io import load_graph, save_graph
from nbl_export.graph.precision import PRECISIONS, to_precision
from nbl_export.packages import pip_line
from nbl_export.runtime import session as module
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
from tests.fixtures_graph import ragged_rows
from tests.graph.parsed import parsed


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
    helper, weights, nodes, last = onnx.helper, [], [], "h"
    data = tmp_path / "weights.data"
    generator = np.random.default_rng(0)
    with data.open("wb") as file:
        for number in range(24):
            array = (generator.standard_normal((1024, 1024)) / 32).astype(ml_dtypes.bfloat16)
            tensor = onnx.TensorProto(
                name=f"w{number}", data_type=onnx.TensorProto.BFLOAT16, dims=[1024, 1024]
            )
            tensor.data_location = onnx.TensorProto.EXTERNAL
            places = {"location": data.name, "offset": file.tell(), "length": array.nbytes}
            for key, value in places.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(array.tobytes())
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [last, tensor.name], [f"h{number}"], name=f"n{number}"))
            last = f"h{number}"
    bf16, single = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("Cast", ["x"], ["h"], to=bf16, name="first"), *nodes]
    nodes.append(helper.make_node("Cast", [last], ["y"], to=single, name="last"))
    values = [helper.make_tensor_value_info(name, single, [3, 1024]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
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
    rewritten: Path, tmp_path: Path, cuda_sessions: list[Any]
) -> None:
    """On the device's GPU, without TF32; what names a provider runs there, and a half graph rounds as it says."""
    cuda = (CUDA, {"device_id": "1", "use_tf32": "0"})
    assert provider_on("cuda:1") == cuda and provider_on("cpu") == provider_on("xpu:0") == CPU
    half = load_graph(rewritten)
    to_precision(half, PRECISIONS["fp16"], {})
    save_graph(half, tmp_path / "half.onnx")
    session(rewritten)
    with pytest.raises(ZeroDivisionError), running_on("cuda:1"):
        session(rewritten)
        OrtModel(tmp_path / "half.onnx")
        session(rewritten, provider=CPU)
        session(rewritten, provider=CUDA)
        raise ZeroDivisionError
    session(rewritten)
    assert cuda_sessions == [[CPU], [cuda, CPU], [cuda, CPU], [CPU], [CUDA, CPU], [CPU]]


def test_sessions_fit_beside_each_other_with_some_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: 100)
    assert fit(90) and fit(50, 40) and not fit(91) and not fit(50, 41)


def test_a_session_has_the_cores_of_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As llama.cpp has: not those that `taskset` or a container takes away."""
    monkeypatch.setattr(machine, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {1, 4, 5}, raising=False)
    assert session_options().intra_op_num_threads == machine.cores() == 3
    for quota, allowed in (("max 100000", 3), ("150000 100000", 2), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota)
        assert machine.cores() == allowed
