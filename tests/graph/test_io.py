"""ONNX files are read whole or refused, and written byte for byte, all or not at all.

What was written is read by onnx's own loader or by NumPy from the file, never by the code under test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from nbl_export.errors import BuildError, InputError
from nbl_export.graph import io
from nbl_export.graph.io import (
    check_file,
    external_files,
    int64_initializer,
    load_graph,
    save_beside,
    save_graph,
)
from tests.fixtures_graph import cpu_session
from tests.graph.by_hand import (
    DATA,
    external,
    graph_of,
    nested_graph,
    places,
    random_bytes,
    raw,
    resolved,
    save,
    two_file_graph,
)
from tests.processes import files_in, killed_at_change


def unchecked(_path: Path) -> None:
    """The graphs of these tests have operators of their own."""


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


# reading -----------------------------------------------------------------------------------------


@pytest.fixture
def graph(tiny_graph: Path, tmp_path: Path) -> Path:
    """A copy of the tiny graph with its data, to be damaged."""
    return Path(shutil.copytree(tiny_graph.parent, tmp_path / "graph")) / "model.onnx"


@pytest.mark.parametrize("content", [b"", b"this is a text file\n" * 50, b"\0" * 4096], ids=len)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(InputError, match="does not exist"):
        load_graph(path)
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable ONNX") as caught:
        load_graph(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_truncated_files_are_refused(graph: Path) -> None:
    data, whole = graph.with_name(DATA), graph.read_bytes()
    size = data.stat().st_size
    os.truncate(data, size - 1)
    with pytest.raises(InputError, match="is truncated") as caught:
        load_graph(graph)
    assert f"{size:,}" in str(caught.value) and f"{size - 1:,}" in str(caught.value)
    data.unlink()
    with pytest.raises(InputError, match=rf"external data {DATA} of .* is missing"):
        load_graph(graph)
    graph.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a readable ONNX"):
        load_graph(graph)


@pytest.mark.parametrize(
    "location", ["../outside.bin", "{folder}/inside.bin", "sub/../../outside.bin", "link.bin"]
)
@pytest.mark.parametrize("home", ["initializer", "constant"])
def test_external_data_outside_the_folder_is_never_opened(tmp_path: Path, location: str, home: str) -> None:
    folder = tmp_path / "graph"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "outside.bin", folder / "inside.bin"):
        path.write_bytes(bytes(16))
    (folder / "link.bin").symlink_to(tmp_path / "outside.bin")
    tensor = external("w", TensorProto.FLOAT, [4], (location.format(folder=folder), 0, 16))
    if home == "initializer":
        proto = graph_of([tensor])
    else:
        proto = graph_of([], [helper.make_node("Constant", [], ["c"], value=tensor)])
    with pytest.raises(InputError, match="lies outside its folder"):
        load_graph(save(proto, folder / "model.onnx"))


@pytest.mark.parametrize(
    ("place", "words"),
    [((-4, 4000), "readable"), ((1, 4000), "truncated"), ((0, 3999), "another"), ((0, 8000), "another")],
)
def test_ranges_that_do_not_fit_are_refused(tmp_path: Path, place: tuple[int, int], words: str) -> None:
    proto = graph_of([external("w", TensorProto.FLOAT, [1000], ("source.bin", *place))])
    with pytest.raises(InputError, match=words):
        load_graph(save(proto, tmp_path / "model.onnx", bytes(4000)))


# writing -----------------------------------------------------------------------------------------


def test_every_byte_arrives_in_aligned_ranges_each_once(tmp_path: Path) -> None:
    two_files = two_file_graph(tmp_path / "source")
    out, steps = tmp_path / "out" / "model.onnx", []
    model = load_graph(two_files)
    assert save_graph(model, out, progress=steps.append) == [out, out.with_name(DATA)]
    assert resolved(out) == resolved(two_files) and files_in(out.parent) == {"model.onnx", DATA}
    assert sum(steps) == 200_000 + 1200 + 20_000
    # Small tensors are inside; a range that two share is stored once.
    found = places(out)
    assert found.keys() == {"large", "small", "tied", "other"} and found["small"] == found["tied"]
    ranges = sorted({(offset, length) for _, offset, length in found.values()})
    assert [offset % (4096 if length >= 65536 else 64) for offset, length in ranges] == [0, 0, 0]
    assert all(a + n <= b < a + n + 4096 for (a, n), (b, _) in pairwise(ranges))
    assert sum(ranges[-1]) == out.with_name(DATA).stat().st_size


def in_memory() -> dict[str, tuple[ir.TensorProtocol, bytes]]:
    """Tensors of several classes of onnx-ir, with the bytes that ONNX prescribes for them."""
    generator = np.random.default_rng(0)
    floats = generator.standard_normal((40, 51)).astype(np.float32)
    nibbles = generator.integers(-8, 8, (41, 101)).astype(np.int8)
    flat = np.append(nibbles.ravel() & 15, 0).astype(np.uint8)  # 4141 elements: pad the last byte
    packed = (flat[0::2] | flat[1::2] << 4)[: (nibbles.size + 1) // 2]
    half = floats.astype(ml_dtypes.bfloat16)
    fields = helper.make_tensor("fields", TensorProto.FLOAT16, [40, 51], floats.astype(np.float16).ravel())
    assert not fields.raw_data  # float16 in int32_data
    return {
        "transposed": (ir.tensor(floats.T), floats.T.tobytes()),
        "bfloat16": (ir.tensor(half), half.tobytes()),
        "int4": (ir.tensor(nibbles.astype(ml_dtypes.int4)), packed.tobytes()),
        "packed": (ir.PackedTensor(packed, ir.DataType.INT4, shape=[41, 101]), packed.tobytes()),
        "lazy": (
            ir.LazyTensor(lambda: ir.tensor(floats * 2), ir.DataType.FLOAT, ir.Shape([40, 51])),
            (floats * 2).tobytes(),
        ),
        "fields": (ir.serde.deserialize_tensor(fields), floats.astype(np.float16).tobytes()),
    }


@pytest.mark.parametrize("name", in_memory())
def test_types_from_memory(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, expected = in_memory()[name]
    model = load_graph(save(graph_of([helper.make_tensor("w", 1, [1], [0.0])]), tmp_path / "in.onnx"))
    model.graph.initializers["w"].const_value = tensor
    monkeypatch.setattr(io, "_BLOCK", 500)
    out = tmp_path / "model.onnx"
    save_graph(model, out, unchecked)
    assert places(out)["w"] == (DATA, 0, len(expected))
    written = onnx.load(str(out)).graph.initializer[0]
    assert written.raw_data == expected
    assert (written.data_type, tuple(written.dims)) == (tensor.dtype.value, tensor.shape.numpy())


def test_nested_tensors_are_written(tmp_path: Path) -> None:
    nested = nested_graph(tmp_path / "nested")

    def outputs(path: Path) -> list[np.ndarray]:
        given = {"x": np.ones(4096, np.float32)}
        return [cpu_session(path).run(None, {**given, "flag": np.array(f)})[0] for f in (True, False)]

    out, expected = tmp_path / "out" / "model.onnx", outputs(nested)
    save_graph(load_graph(nested), out, unchecked)
    assert resolved(out) == resolved(nested)
    shutil.rmtree(nested.parent)
    assert all(np.array_equal(a, b) for a, b in zip(outputs(out), expected, strict=True))
    assert (out.parent / "source.bin").stat().st_size == 5 * 16384


_MEASURED = """
    import sys
    from pathlib import Path
    from nbl_export.graph.io import load_graph, save_graph
    model = load_graph(Path(sys.argv[1]))
    status = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    before = status()
    save_graph(model, Path(sys.argv[2]), lambda path: None)
    print(before, status())
"""


def test_large_files_take_little_memory(tmp_path: Path) -> None:
    """The end of a sparse file of 6 GB is copied; VmHWM, since ru_maxrss begins with the parent's."""
    at, size = 6 * 2**30 + 12, 256 << 20
    mark = random_bytes(8000)
    proto = graph_of([external("far", TensorProto.FLOAT16, [size // 2], (DATA, at, size))])
    path = save(proto, tmp_path / "in" / "model.onnx")
    with path.with_name(DATA).open("wb") as file:
        file.truncate(at + size)
        file.seek(at + size - 8000)
        file.write(mark)
    out = tmp_path / "out" / "model.onnx"
    command = [sys.executable, "-c", textwrap.dedent(_MEASURED), str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    with out.with_name(DATA).open("rb") as file:
        file.seek(size - 8000)
        assert file.read() == mark
    before, peak = map(int, done.stdout.split())
    assert peak - before < 50 << 10


# beside other graphs -----------------------------------------------------------------------------

SIZE = 64


def weights(seed: int, number: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"w{i}": rng.standard_normal((SIZE, SIZE)).astype(np.float32) for i in range(number)}


def chain(arrays: dict[str, np.ndarray]) -> ir.Model:
    """x times each matrix in turn."""
    tensors = ["x", *(f"y{i}" for i in range(len(arrays)))]
    nodes = [helper.make_node("MatMul", [tensors[i], w], [tensors[i + 1]]) for i, w in enumerate(arrays)]
    ends = [helper.make_tensor_value_info(n, 1, ["n", SIZE]) for n in (tensors[0], tensors[-1])]
    initializers = [onnx.numpy_helper.from_array(a, n) for n, a in arrays.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def changed(base: Path, name: str = "w1", seed: int = 7) -> ir.Model:
    """The graph at ``base`` with another matrix."""
    model = load_graph(base)
    model.graph.initializers[name].const_value = ir.tensor(weights(seed)["w0"], name=name)
    return model


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "out" / "baseline" / "model.onnx"
    path.parent.mkdir(parents=True)
    save_graph(chain(weights(0)), path)
    return path


def test_weights_below_stay_and_the_others_have_a_file(base: Path) -> None:
    before, path = base.with_name(DATA).read_bytes(), base.parents[1] / "model.onnx"
    assert save_beside(changed(base), path) == [path, path.with_name(DATA)]
    below = f"baseline/{DATA}"
    assert {n: place[0] for n, place in places(path).items()} == {"w0": below, "w1": DATA, "w2": below}
    assert base.with_name(DATA).read_bytes() == before
    assert path.with_name(DATA).stat().st_size == SIZE * SIZE * 4
    check_file(path)
    expected = weights(0) | {"w1": weights(7)["w0"]}
    assert raw(path) == {n: a.tobytes() for n, a in expected.items()}
    # Without new weights there is no file, and those from elsewhere are copied.
    assert save_beside(load_graph(base), path) == [path]
    assert files_in(path.parent) == {"model.onnx", "baseline/model.onnx", below} and raw(path) == raw(base)
    other = base.parents[2] / "other" / "model.onnx"
    save_beside(load_graph(base), other)
    assert external_files(load_graph(other)) == [other.with_name(DATA)] and raw(other) == raw(base)


def test_a_graph_that_reads_replaced_data_is_gone_before(base: Path) -> None:
    path = base.parents[1] / "model.onnx"
    save_beside(changed(base), path)
    save_graph(chain(weights(3)), base, readers=[path])
    assert not path.exists() and raw(base) == {n: a.tobytes() for n, a in weights(3).items()}


SAVES: dict[str, Callable[..., list[Path]]] = {"alone": save_graph, "beside": save_beside}


@pytest.mark.parametrize("error", [BuildError("no"), OSError(28, "No space"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("how", SAVES)
def test_a_refused_graph_leaves_the_old_files(base: Path, how: str, error: BaseException) -> None:
    path = base.parents[1] / "model.onnx"
    save_beside(changed(base), path)
    before = contents(path.parent)
    seen: list[Any] = []

    def refuse(written: Path) -> None:
        check_file(written)
        seen.append(raw(written))
        raise error

    with pytest.raises(type(error)):
        SAVES[how](changed(base, "w2"), path, refuse)
    assert seen[0]["w2"] == weights(7)["w0"].tobytes() and contents(path.parent) == before


@pytest.mark.parametrize("how", SAVES)
def test_no_kill_leaves_the_old_graph_with_new_data(base: Path, how: str) -> None:
    """It would load, and compute something else."""
    path = base.parents[1] / "model.onnx"
    save_beside(changed(base), path)
    old, files = raw(path), {p: p.read_bytes() for p in (path, path.with_name(DATA))}
    new = old | {"w1": weights(8)["w0"].tobytes()}
    for number in count():
        for file, content in files.items():
            file.write_bytes(content)
        killed = killed_at_change(
            number, path.parent, lambda: SAVES[how](changed(base, "w1", 8), path, unchecked) and None
        )
        if path.exists():
            assert raw(path) in (old, new), number
        if not killed:
            break
    assert number > 10 and raw(path) == new


# checks, copies, initializers --------------------------------------------------------------------


def test_the_checker_refuses_what_onnx_refuses(base: Path) -> None:
    check_file(base)
    proto = onnx.load(str(base), load_external_data=False)
    proto.graph.initializer[2].dims[:] = [SIZE // 2, 2 * SIZE]  # strict shape inference
    base.write_bytes(proto.SerializeToString())
    with pytest.raises(BuildError, match="does not pass the ONNX checker"):
        check_file(base)
    proto.graph.node[-1].op_type = "NoSuchOperator"
    base.write_bytes(proto.SerializeToString())
    with pytest.raises(BuildError, match="does not pass the ONNX checker") as caught:
        check_file(base)
    assert "\n" not in str(caught.value)


def test_equal_numbers_share_an_initializer() -> None:
    graph = chain(weights(0)).graph
    one = int64_initializer(graph, "n", [1])
    assert (one.name, int64_initializer(graph, "n", [1])) == ("n", one)
    others = [int64_initializer(graph, "n", number) for number in (1, [2], 1)]
    assert [v.name for v in others] == ["n.1", "n.2", "n.1"] and others[0] is others[2]
    assert others[1].const_value is not None and others[1].const_value.numpy().tolist() == [2]
