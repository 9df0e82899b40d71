"""A graph that reads weights from a folder below: they stay there, its own data file has the others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from nbl_export.errors import BuildError
from nbl_export.graph import external_data
from nbl_export.graph.io import check_file, load_graph, save_beside, save_graph
from nbl_export.graph.tensors import bytes_read_from, external_files
from tests.folders import files_in
from tests.graph.external_data import places, raw
from tests.sessions import cpu_session

SIZE = 64


def weights(seed: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"w{i}": rng.standard_normal((SIZE, SIZE)).astype(np.float32) for i in range(count)}


def chain(arrays: dict[str, np.ndarray]) -> ir.Model:
    """x times each matrix in turn."""
    helper = onnx.helper
    names = ["x", *(f"y{i}" for i in range(len(arrays)))]
    nodes = [helper.make_node("MatMul", [names[i], w], [names[i + 1]]) for i, w in enumerate(arrays)]
    ends = [helper.make_tensor_value_info(n, 1, ["n", SIZE]) for n in (names[0], names[-1])]
    initializers = [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def changed(base: Path, name: str = "w1", seed: int = 7) -> ir.Model:
    """The graph at ``base`` with another matrix."""
    model = load_graph(base)
    model.graph.initializers[name].const_value = ir.tensor(weights(seed, 1)["w0"], name=name)
    return model


def computed(path: Path) -> Any:
    x = np.linspace(-1, 1, SIZE, dtype=np.float32)[None]
    return cpu_session(path).run(None, {"x": x})[0]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "out" / "baseline" / "model.onnx"
    path.parent.mkdir(parents=True)
    save_graph(chain(weights(0, 3)), path)
    return path


def test_weights_below_stay_and_the_others_have_a_file(base: Path) -> None:
    before = base.with_name("model.onnx.data").read_bytes()
    path = base.parents[1] / "model.onnx"
    files = save_beside(changed(base), path)
    assert files == [path, path.with_name("model.onnx.data")]
    assert {n: place[0] for n, place in places(path).items()} == {
        "w0": "baseline/model.onnx.data",
        "w1": "model.onnx.data",
        "w2": "baseline/model.onnx.data",
    }
    assert base.with_name("model.onnx.data").read_bytes() == before
    assert files[1].stat().st_size == SIZE * SIZE * 4
    check_file(path)
    expected = weights(0, 3) | {"w1": weights(7, 1)["w0"]}
    assert raw(path) == {n: a.tobytes() for n, a in expected.items()}
    x = np.linspace(-1, 1, SIZE, dtype=np.float32)[None]
    np.testing.assert_allclose(
        computed(path), x @ expected["w0"] @ expected["w1"] @ expected["w2"], rtol=1e-3, atol=1e-2
    )
    assert bytes_read_from(load_graph(path), base.with_name("model.onnx.data")) == 2 * SIZE * SIZE * 4


def test_without_new_weights_there_is_no_file(base: Path) -> None:
    path = base.parents[1] / "model.onnx"
    save_beside(changed(base), path)
    assert save_beside(load_graph(base), path) == [path]
    assert files_in(path.parent) == {"model.onnx", "baseline/model.onnx", "baseline/model.onnx.data"}
    assert (computed(path) == computed(base)).all()


def test_weights_from_elsewhere_are_copied(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "other" / "model.onnx"
    save_beside(load_graph(base), path)
    assert external_files(load_graph(path)) == [path.with_name("model.onnx.data")]
    assert raw(path) == raw(base)


def test_a_refused_graph_leaves_the_old_files(base: Path) -> None:
    path = base.parents[1] / "model.onnx"
    save_beside(changed(base), path)
    before = {name: (path.parent / name).read_bytes() for name in files_in(path.parent)}
    seen: list[Any] = []

    def refuse(written: Path) -> None:
        check_file(written)
        seen.append(computed(written))
        raise BuildError("no")

    with pytest.raises(BuildError):
        save_beside(changed(base, "w2"), path, refuse)
    assert seen and {n: (path.parent / n).read_bytes() for n in files_in(path.parent)} == before


@pytest.mark.parametrize("stop", ["data", "graph"])
def test_a_kill_leaves_no_old_graph_with_new_data(
    base: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    path = base.parents[1] / "model.onnx"
    save_beside(changed(base), path)
    save_beside(changed(base, "w1", 8), new := path.with_name("new.onnx"))
    whole, new_whole = raw(path), raw(new)

    class Killed(BaseException):
        pass

    real = Path.replace

    def replace(self: Path, target: Any) -> Path:
        name = Path(target).name
        if name == ("model.onnx.data" if stop == "data" else "model.onnx"):
            raise Killed
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(Killed):
        save_beside(changed(base, "w1", 8), path)
    monkeypatch.undo()
    assert not path.exists() or raw(path) in (whole, new_whole)
    save_beside(changed(base, "w1", 8), path)
    assert raw(path) == new_whole


def test_two_names_of_one_file_are_not_written_through(base: Path, tmp_path: Path) -> None:
    """A data file that has another name elsewhere is replaced, not changed."""
    path = base.parents[1] / "model.onnx"
    save_beside(changed(base), path)
    other = tmp_path / "kept.data"
    os.link(path.with_name("model.onnx.data"), other)
    before = other.read_bytes()
    save_beside(changed(base, "w1", 8), path)
    assert other.read_bytes() == before != path.with_name("model.onnx.data").read_bytes()


def test_a_graph_that_reads_replaced_data_is_gone_before(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = base.parents[1] / "model.onnx"
    save_beside(changed(base), path)
    seen: list[bool] = []
    real = Path.replace

    def replace(self: Path, target: Any) -> Path:
        if Path(target) == base.with_name("model.onnx.data"):
            seen.append(path.exists())
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    save_graph(chain(weights(3, 3)), base, readers=[path])
    assert seen == [False] and not path.exists()
    assert external_data.INLINE_BYTES < SIZE * SIZE
