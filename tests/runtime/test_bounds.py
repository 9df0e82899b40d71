"""What loading and running a graph may take: memory and seconds are bounded, and then one sentence is said."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from nbl_export import running_time
from nbl_export.errors import InputError
from nbl_export.runtime import bounds
from nbl_export.runtime.bounds import Bounds, Late, bounded, bounds_of
from nbl_export.runtime.session import require_onnxruntime, run_session, session
from tests.conftest import ROOT

linux = pytest.mark.skipif(sys.platform != "linux", reason="memory has a bound on Linux only")


def graph_of(path: Path, nodes: list[onnx.NodeProto], **constants: list[int]) -> Path:
    """A graph from x [n] to y."""
    value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    stored = [
        onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(numbers)], numbers)
        for name, numbers in constants.items()
    ]
    graph = onnx.helper.make_graph(nodes, "g", [value("x", kind, ["n"])], [value("y", kind, None)], stored)
    imports = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=9), path)
    return path


def memory_bomb(path: Path) -> Path:
    """A graph that fills 4 GiB from an input of any length."""
    make = onnx.helper.make_node
    nodes = [
        make("Shape", ["x"], ["shape"]),
        make("Mul", ["shape", "many"], ["size"]),
        make("ConstantOfShape", ["size"], ["filled"]),
        make("ReduceMax", ["filled"], ["y"], keepdims=0),
    ]
    return graph_of(path, nodes, many=[2**30])


def endless_operator(path: Path) -> Path:
    """One Conv of 2^24 positions and a kernel of 2^22: hours, in half a GiB."""
    make = onnx.helper.make_node
    nodes = [
        make("ConstantOfShape", ["long"], ["zeros"]),
        make("ReduceMax", ["x"], ["most"], keepdims=0),
        make("Add", ["zeros", "most"], ["signal"]),
        make("ConstantOfShape", ["short"], ["kernel"]),
        make("Conv", ["signal", "kernel"], ["y"], pads=[2**21, 2**21]),
    ]
    return graph_of(path, nodes, long=[1, 1, 2**24], short=[1, 1, 2**22])


@linux
def test_an_operator_that_asks_for_all_memory_gets_none(tmp_path: Path) -> None:
    loaded = session(memory_bomb(tmp_path / "m.onnx"))
    with pytest.raises(InputError, match=r"onnxruntime does not run the graph: .*[Ff]ailed to allocate"):
        run_session(loaded, ["y"], {"x": np.ones(1, np.float32)}, bounds_of(0))


@linux
def test_the_limit_ends_with_the_work_and_the_widest_of_two_holds() -> None:
    import resource

    def limit() -> int:
        return resource.getrlimit(resource.RLIMIT_DATA)[0]

    before = limit()
    with bounded(Bounds(60, 1 << 30), "run the graph"):
        small = limit()
        with bounded(Bounds(60, 2 << 30), "run the graph"):
            assert limit() - small > 1 << 29
        assert limit() == small != before
        with bounded(Bounds(60, None), "run the graph"):
            assert limit() == small
    assert limit() == before


def test_what_a_load_maps_takes_no_memory_and_counts_for_the_limit() -> None:
    import resource

    with bounded(Bounds(60.0, 1 << 28), "load the graph"):
        without = resource.getrlimit(resource.RLIMIT_DATA)[0]
    with bounded(Bounds(60.0, 1 << 28, mapped=1 << 40), "load the graph"):
        assert abs(resource.getrlimit(resource.RLIMIT_DATA)[0] - without - (1 << 40)) < 1 << 26
    assert Bounds(60.0, 1 << 28, mapped=1 << 40).fed({}).mapped == 0


def test_bounds_grow_with_the_graph_and_with_what_is_fed() -> None:
    assert bounds_of(2_000_000).seconds == 47
    assert bounds_of(2_000_000, 5).seconds == 5
    small, large = bounds_of(0), bounds_of(1 << 30)
    assert small.memory == 2 << 30 and large.memory == 18 << 30
    ids, mask = np.zeros((2, 100), np.int64), np.ones((2, 4096), np.int64)
    fed = small.fed({"input_ids": ids, "attention_mask": mask})
    # Attention of 4,096 tokens to 4,096 in float32, by 32 heads, three times over: 6 GiB.
    assert fed.memory is not None and fed.memory > 8 << 30
    image = small.fed({"pixel_values": np.zeros((1, 3, 1024, 1024), np.float32)})
    assert image.memory == (2 << 30) + 256 * 3 * 4 * 1024**2
    assert Bounds(1, None).fed({"input_ids": ids}).memory is None
    # 8,192 tokens took SmolLM2-135M 24 s on two cores, and four times as many take sixteen times as long.
    long = np.zeros((1, 32_768), np.int64)
    assert small.fed({"input_ids": long}).seconds > 45 + 10 * 16 * 13


def test_time_in_which_the_process_is_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    options = require_onnxruntime().RunOptions()
    now = [0.0]
    monkeypatch.setattr(running_time.time, "monotonic", lambda: now[0])
    work = bounds._Work(5, "run the graph", options)
    ended = []
    for later in (0.5, 3_600, 3_600.5, *np.arange(3_601, 3_604.5, 0.5)):
        now[0] = later
        work.look()
        ended.append(options.terminate)
    assert ended == [False] * 9 + [True]


def test_an_error_of_another_reason_is_not_called_late() -> None:
    options = require_onnxruntime().RunOptions()
    with pytest.raises(ValueError, match=r"^another$"), bounded(bounds_of(0), "run the graph", options):
        raise ValueError("another")
    options.terminate = True
    with pytest.raises(Late, match="longer than 45 s"), bounded(bounds_of(0), "run the graph", options):
        raise ValueError("ended")


def test_what_does_not_return_is_said_once_it_had_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    heard = threading.Event()

    def stuck(sentence: str) -> None:
        said.append(sentence)
        heard.set()

    monkeypatch.setattr(bounds, "when_stuck", stuck)
    start = time.monotonic()
    with bounded(Bounds(1, None), "load m.onnx"):
        assert heard.wait(20)
    assert time.monotonic() - start >= 1
    assert said[0].startswith("onnxruntime does not load m.onnx: it takes longer than 1 s; export")


def test_an_operator_that_never_returns_ends_the_command(tmp_path: Path) -> None:
    path = endless_operator(tmp_path / "m.onnx")
    code = f"""
import sys
import numpy as np
from nbl_export.cli import process
from nbl_export.cli.main import _said
from nbl_export.runtime import bounds, session
bounds._GRACE = 1
loaded = session.session({path!r})
feeds = {{"x": np.ones(1, np.float32)}}
sys.exit(process.run(lambda: session.run_session(loaded, ["y"], feeds, bounds.bounds_of(0, 1)), _said))
""".replace("PosixPath", "__import__('pathlib').Path")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 2
    said = "error: onnxruntime does not run the graph: one operator takes longer than 1 s; export the model again"
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
