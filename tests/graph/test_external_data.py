"""Weights go from file to file byte for byte, whatever their type, place or size.

What was written is read by onnx's own loader or by NumPy from the file, never by the code under test.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from nbl_export.errors import BuildError, InputError
from nbl_export.graph import external_data as store
from nbl_export.graph.external_data import append_graph, write_graph
from nbl_export.graph.tensors import all_tensors
from tests.graph.external_data import (
    DATA,
    external,
    graph_of,
    opened,
    places,
    random_bytes,
    raw,
    resolved,
    save,
    snapshot,
)
from tests.sessions import cpu_session

# write_graph --------------------------------------------------------------------------------------


def test_every_byte_arrives(two_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.onnx"
    assert write_graph(ir.load(two_files), out, DATA) == [out, out.with_name(DATA)]
    assert resolved(out) == resolved(two_files)
    assert {p.name for p in out.parent.iterdir()} == {"model.onnx", DATA}
    for name, (location, offset, length) in places(out).items():
        assert location == DATA
        source, start, _ = places(two_files)[name]
        written = (out.parent / DATA).read_bytes()[offset : offset + length]
        assert written == (two_files.parent / source).read_bytes()[start : start + length]


def test_small_tensors_are_inside(two_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    write_graph(ir.load(two_files), out, DATA)
    assert places(out).keys() == {"large", "small", "tied", "other"}
    write_graph(ir.load(two_files), out, DATA, inline_below=2000)
    assert places(out).keys() == {"large", "other"}
    assert resolved(out) == resolved(two_files)
    write_graph(ir.load(two_files), out, DATA, inline_below=0)
    assert places(out).keys() == {"large", "small", "tied", "other", "tiny", "inside"}
    assert resolved(out) == resolved(two_files)


def test_offsets_are_aligned_and_ranges_do_not_overlap(two_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    write_graph(ir.load(two_files), out, DATA, inline_below=0)
    ranges = sorted({(offset, length) for _, offset, length in places(out).values()})
    for offset, length in ranges:
        assert offset % (4096 if length >= 65536 else 64) == 0
    assert all(a + n <= b for (a, n), (b, _) in pairwise(ranges))
    offset, length = ranges[-1]
    assert offset + length == out.with_name(DATA).stat().st_size


def test_a_shared_range_is_stored_once(two_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    write_graph(ir.load(two_files), out, DATA)
    found = places(out)
    assert found["small"] == found["tied"]
    assert out.with_name(DATA).stat().st_size < 200_000 + 1200 + 20_000 + 3 * 4096


def test_ranges_that_only_resemble_each_other_are_both_stored(tmp_path: Path) -> None:
    """Of one beginning but another length, and of the same place in the same-named file of two folders."""
    data = [random_bytes(8000, seed) for seed in (1, 2)]
    for name, content in zip("ab", data, strict=True):
        pair = [external("w", TensorProto.FLOAT, [2000], ("source.bin", 0, 8000))]
        pair += [external("half", TensorProto.FLOAT, [1000], ("source.bin", 0, 4000))]
        save(graph_of(pair), tmp_path / name / "model.onnx", content)
    model, other = (ir.load(tmp_path / name / "model.onnx") for name in "ab")
    out = tmp_path / "model.onnx"
    write_graph(model, out, DATA)
    assert raw(out) == {"w": data[0], "half": data[0][:4000]}
    model.graph.initializers["half"].const_value = other.graph.initializers["half"].const_value
    write_graph(model, out, DATA)
    assert raw(out) == {"w": data[0], "half": data[1][:4000]}


def test_one_tensor_object_of_two_initializers_is_stored_once(tmp_path: Path) -> None:
    path = save(graph_of([helper.make_tensor(n, 1, [2], [0.0, 0.0]) for n in "ab"]), tmp_path / "in.onnx")
    model = ir.load(path)
    shared = ir.tensor(np.arange(5000, dtype=np.float32))
    for name in "ab":
        model.graph.initializers[name].const_value = shared
    before = snapshot(model)
    out = tmp_path / "model.onnx"
    write_graph(model, out, DATA)
    assert places(out)["a"] == places(out)["b"]
    assert out.with_name(DATA).stat().st_size == 20_000
    assert snapshot(model) == before


def test_without_a_data_file_everything_is_inside(two_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.onnx"
    assert write_graph(ir.load(two_files), out, None) == [out]
    assert not places(out)
    out.rename(tmp_path / "alone.onnx")  # nothing beside it
    assert resolved(tmp_path / "alone.onnx") == resolved(two_files)


def test_no_empty_data_file_is_made(tmp_path: Path) -> None:
    proto = graph_of([helper.make_tensor("a", TensorProto.FLOAT, [3], [1, 2, 3])])
    out = tmp_path / "out" / "model.onnx"
    assert write_graph(ir.load(save(proto, tmp_path / "in.onnx")), out, DATA) == [out]
    assert [p.name for p in out.parent.iterdir()] == ["model.onnx"]


def test_the_model_is_as_it_was(two_files: Path, tmp_path: Path) -> None:
    model = ir.load(two_files)
    model.graph.initializers["large"].const_value = ir.tensor(np.ones(50_000, np.float32))  # has no name
    before = snapshot(model)
    write_graph(model, tmp_path / "a.onnx", DATA)
    write_graph(model, tmp_path / "b.onnx", None)
    append_graph(model, tmp_path / "c.onnx", tmp_path / "c.data")
    assert snapshot(model) == before
    with pytest.raises(BuildError):
        write_graph(model, tmp_path / "d.onnx", "../d.data")
    assert snapshot(model) == before
    assert ("large", None) in [(where, name) for where, _, name, *_ in before[:6]]


def test_progress_adds_up(two_files: Path, tmp_path: Path) -> None:
    steps: list[int] = []
    write_graph(ir.load(two_files), tmp_path / "model.onnx", DATA, progress=steps.append)
    assert sum(steps) == 200_000 + 1200 + 20_000
    assert min(steps) > 0


def test_overwriting_its_own_source_is_refused(two_files: Path) -> None:
    before = (two_files.parent / "a.bin").read_bytes()
    with pytest.raises(BuildError, match="cannot be overwritten"):
        write_graph(ir.load(two_files), two_files, "a.bin")
    assert (two_files.parent / "a.bin").read_bytes() == before
    onnx.load(str(two_files))


def test_what_protobuf_cannot_hold_is_refused(
    two_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = 200_000 + 2 * 1200 + 20_000 + 24 + 8
    monkeypatch.setattr(store, "PROTOBUF_BYTES", total)
    write_graph(ir.load(two_files), tmp_path / "fits.onnx", None)
    monkeypatch.setattr(store, "PROTOBUF_BYTES", total - 1)
    with pytest.raises(BuildError, match="external data file") as caught:
        write_graph(ir.load(two_files), tmp_path / "model.onnx", None)
    assert f"{total:,}" in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


def test_more_than_two_gigabytes_inside_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with (tmp_path / "source.bin").open("wb") as file:
        file.truncate(3 << 30)
    proto = graph_of([external("w", TensorProto.FLOAT, [3 << 28], ("source.bin", 0, 3 << 30))])
    with pytest.raises(BuildError, match="3,221,225,472"):
        write_graph(ir.load(save(proto, tmp_path / "in.onnx")), tmp_path / "model.onnx", None)


# types --------------------------------------------------------------------------------------------

_TYPES = [
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT8,
    TensorProto.UINT16,
    TensorProto.INT64,
    TensorProto.COMPLEX64,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.FLOAT8E5M2,
    TensorProto.INT4,
    TensorProto.UINT4,
    TensorProto.FLOAT4E2M1,
]


@pytest.mark.parametrize("kind", _TYPES, ids=[TensorProto.DataType.Name(k) for k in _TYPES])
@pytest.mark.parametrize("inside", [False, True], ids=["external", "inside"])
def test_types_from_a_file(tmp_path: Path, kind: int, inside: bool) -> None:
    bits = ir.DataType(kind).bitwidth
    length = (bits * 4001 * 3 + 7) // 8  # an odd number of elements: the last int4 byte is half used
    data = random_bytes(length + 5)
    proto = graph_of([external("w", kind, [4001, 3], ("source.bin", 5, length))])
    path = save(proto, tmp_path / "in" / "model.onnx", data)
    out = tmp_path / "model.onnx"
    write_graph(ir.load(path), out, None if inside else DATA)
    assert raw(out)["w"] == data[5:]
    tensor = onnx.load(str(out)).graph.initializer[0]
    assert (tensor.data_type, list(tensor.dims)) == (kind, [4001, 3])


def in_memory() -> dict[str, tuple[ir.TensorProtocol, bytes]]:
    """Tensors of every class of onnx-ir, with the bytes that ONNX prescribes for them."""
    generator = np.random.default_rng(0)
    floats = generator.standard_normal((40, 51)).astype(np.float32)
    nibbles = generator.integers(-8, 8, (41, 101)).astype(np.int8)
    flat = np.append(nibbles.ravel() & 15, 0).astype(np.uint8)  # 4141 elements: pad the last byte
    packed = (flat[0::2] | flat[1::2] << 4)[: (nibbles.size + 1) // 2]
    flags = floats > 0
    eight = floats.astype(ml_dtypes.float8_e4m3fn)
    fields = helper.make_tensor("fields", TensorProto.FLOAT16, [40, 51], floats.astype(np.float16).ravel())
    assert not fields.raw_data  # float16 in int32_data
    return {
        "numpy": (ir.tensor(floats), floats.tobytes()),
        "transposed": (ir.tensor(floats.T), floats.T.tobytes()),
        "bfloat16": (
            ir.tensor(floats.astype(ml_dtypes.bfloat16)),
            floats.astype(ml_dtypes.bfloat16).tobytes(),
        ),
        "bool": (ir.tensor(flags), flags.astype(np.uint8).tobytes()),
        "float8": (ir.tensor(eight), eight.tobytes()),
        "int4": (ir.tensor(nibbles.astype(ml_dtypes.int4)), packed.tobytes()),
        "packed": (ir.PackedTensor(packed, ir.DataType.INT4, shape=[41, 101]), packed.tobytes()),
        "lazy": (
            ir.LazyTensor(lambda: ir.tensor(floats * 2), ir.DataType.FLOAT, ir.Shape([40, 51])),
            (floats * 2).tobytes(),
        ),
        "fields": (ir.serde.deserialize_tensor(fields), floats.astype(np.float16).tobytes()),
    }


@pytest.mark.parametrize("name", in_memory())
@pytest.mark.parametrize("how", ["external", "inside", "appended"])
def test_types_from_memory(tmp_path: Path, name: str, how: str) -> None:
    tensor, expected = in_memory()[name]
    proto = graph_of([helper.make_tensor("w", TensorProto.FLOAT, [1], [0.0])])
    model = ir.load(save(proto, tmp_path / "in.onnx"))
    model.graph.initializers["w"].const_value = tensor
    out = tmp_path / "model.onnx"
    if how == "appended":
        assert append_graph(model, out, out.with_name(DATA)) == len(expected)
    else:
        write_graph(model, out, DATA if how == "external" else None)
    assert ("w" in places(out)) == (how != "inside")
    written = onnx.load(str(out)).graph.initializer[0]
    assert written.raw_data == expected or (name == "fields" and how == "inside")
    assert (written.data_type, tuple(written.dims)) == (tensor.dtype.value, tensor.shape.numpy())
    if name == "fields":
        reference = np.frombuffer(expected, np.float16).reshape(40, 51)
        assert np.array_equal(onnx.numpy_helper.to_array(written), reference)


def test_two_bit_tensors(tmp_path: Path) -> None:
    if not hasattr(ir.DataType, "INT2"):
        pytest.skip("needs an onnx-ir with 2-bit types")
    packed = np.frombuffer(random_bytes(2500), np.uint8)
    model = ir.load(save(graph_of([helper.make_tensor("w", 1, [1], [0.0])]), tmp_path / "in.onnx"))
    tensor = ir.PackedTensor(packed, ir.DataType.INT2, shape=[100, 100])
    model.graph.initializers["w"].const_value = tensor
    out = tmp_path / "model.onnx"
    write_graph(model, out, DATA)
    assert places(out)["w"] == (DATA, 0, 2500)
    assert out.with_name(DATA).read_bytes() == packed.tobytes()
    again = tmp_path / "again" / "model.onnx"
    write_graph(ir.load(out), again, DATA)
    assert again.with_name(DATA).read_bytes() == packed.tobytes()


def test_strings_stay_inside_however_long(two_files: Path, tmp_path: Path) -> None:
    proto = onnx.load(str(two_files), load_external_data=False)
    words = [b"a" * 5000, b"\xff\x00", b""]
    proto.graph.initializer.append(
        TensorProto(name="words", data_type=TensorProto.STRING, dims=[3], string_data=words)
    )
    two_files.write_bytes(proto.SerializeToString())
    for write in (write_graph, lambda m, p, d: append_graph(m, p, p.with_name(d))):
        out = tmp_path / "out" / "model.onnx"
        out.parent.mkdir()
        write(ir.load(two_files), out, DATA)  # type: ignore[operator]
        found = {t.name: t for t in onnx.load(str(out)).graph.initializer}
        assert list(found["words"].string_data) == words
        shutil.rmtree(out.parent)


def test_external_strings_are_refused(tmp_path: Path) -> None:
    proto = graph_of([external("words", TensorProto.STRING, [3], ("source.bin", 0, 30))])
    model = ir.load(save(proto, tmp_path / "in.onnx", bytes(100)))
    with pytest.raises(InputError, match="words has its strings in external data"):
        write_graph(model, tmp_path / "model.onnx", DATA)


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    proto = graph_of(
        [
            external("empty", TensorProto.FLOAT, [0, 4], ("source.bin", 3, 0)),
            external("scalar", TensorProto.FLOAT, [], ("source.bin", 4, 4)),
        ]
    )
    path = save(proto, tmp_path / "in" / "model.onnx", random_bytes(8))
    for least in (0, 1024):
        out = tmp_path / f"{least}.onnx"
        write_graph(ir.load(path), out, DATA, inline_below=least)
        found = {t.name: t for t in onnx.load(str(out)).graph.initializer}
        assert found["scalar"].raw_data == random_bytes(8)[4:]
        assert onnx.numpy_helper.to_array(found["empty"]).shape == (0, 4)


def test_offset_and_length_may_be_missing(tmp_path: Path) -> None:
    tensor = external("w", TensorProto.FLOAT, [1000], ("source.bin", 0, 4000))
    del tensor.external_data[1:]
    path = save(graph_of([tensor]), tmp_path / "in" / "model.onnx", random_bytes(4000))
    out = tmp_path / "model.onnx"
    write_graph(ir.load(path), out, DATA)
    assert places(out)["w"] == (DATA, 0, 4000)
    assert raw(out)["w"] == random_bytes(4000)


def test_a_lazy_tensor_that_lies_about_its_shape_is_refused(tmp_path: Path) -> None:
    model = ir.load(save(graph_of([helper.make_tensor("w", 1, [1], [0.0])]), tmp_path / "in.onnx"))
    lie = ir.LazyTensor(
        lambda: ir.tensor(np.zeros(3000, np.float32)), ir.DataType.FLOAT, ir.Shape([4000]), name="w"
    )
    model.graph.initializers["w"].const_value = lie
    with pytest.raises(BuildError, match="w gives 12,000 bytes, its type and shape say 16,000"):
        write_graph(model, tmp_path / "model.onnx", DATA)
    assert not (tmp_path / DATA).exists() and not (tmp_path / "model.onnx").exists()


# everywhere in a model ----------------------------------------------------------------------------


def outputs(path: Path) -> list[np.ndarray]:
    session = cpu_session(path)
    x = np.ones(4096, np.float32)
    return [session.run(None, {"x": x, "flag": np.array(flag)})[0] for flag in (True, False)]


def test_a_list_of_tensors_in_an_attribute(tmp_path: Path) -> None:
    data = random_bytes(16_000)
    tensors = [external(f"t{i}", TensorProto.FLOAT, [2000], ("source.bin", i * 8000, 8000)) for i in (0, 1)]
    node = helper.make_node("Many", [], ["y"], name="many", domain="local", values=tensors)
    graph = helper.make_graph([node], "main", [], [helper.make_tensor_value_info("y", 1, [1])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("local", 1)], ir_version=10)
    path = save(proto, tmp_path / "in" / "model.onnx", data)
    model = opened(path)
    before = snapshot(model)
    assert [where for where, _ in all_tensors(model)] == ["attribute values of node many"] * 2
    for name in (DATA, None):
        out = tmp_path / f"{name}" / "model.onnx"
        write_graph(model, out, name)
        assert snapshot(model) == before
        written = resolved(out).graph.node[0].attribute[0].tensors
        assert [t.raw_data for t in written] == [data[:8000], data[8000:]]


@pytest.mark.parametrize("data", [DATA, None])
def test_nested_tensors_are_written(nested: Path, tmp_path: Path, data: str | None) -> None:
    out = tmp_path / "out" / "model.onnx"
    model = opened(nested)
    before = snapshot(model)
    write_graph(model, out, data)
    assert snapshot(model) == before
    assert resolved(out) == resolved(nested)
    expected = outputs(nested)
    shutil.rmtree(nested.parent)
    for a, b in zip(outputs(out), expected, strict=True):
        assert np.array_equal(a, b)
    if data:
        assert out.with_name(data).stat().st_size == 5 * 16384


def test_nested_tensors_stay_when_appended_to(nested: Path) -> None:
    reference, expected = resolved(nested), outputs(nested)
    size = (nested.parent / "source.bin").stat().st_size
    assert append_graph(opened(nested), nested, nested.parent / "source.bin") == 0
    assert (nested.parent / "source.bin").stat().st_size == size
    assert resolved(nested) == reference
    for a, b in zip(outputs(nested), expected, strict=True):
        assert np.array_equal(a, b)


def test_large_attributes_in_memory_stay_in_the_protobuf(tmp_path: Path) -> None:
    values = np.arange(5000, dtype=np.float32)
    node = helper.make_node("Constant", [], ["y"], value=onnx.numpy_helper.from_array(values, "c"))
    graph = helper.make_graph([node], "main", [], [helper.make_tensor_value_info("y", 1, [5000])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    out = tmp_path / "out" / "model.onnx"
    assert write_graph(ir.load(save(proto, tmp_path / "in.onnx")), out, DATA) == [out]
    assert onnx.load(str(out)).graph.node[0].attribute[0].t.raw_data == values.tobytes()


# size ---------------------------------------------------------------------------------------------


def test_offsets_past_four_gigabytes(tmp_path: Path) -> None:
    """Weights at the end of a 6 GB file are copied from there and appended behind there."""
    at = 6 * 2**30 + 12
    mark = random_bytes(8000)
    path = tmp_path / "in" / "model.onnx"
    proto = graph_of([external("far", TensorProto.FLOAT, [2000], (DATA, at, 8000))])
    save(proto, path)
    with path.with_name(DATA).open("wb") as file:
        file.seek(at)
        file.write(mark)
    out = tmp_path / "out" / "model.onnx"
    write_graph(ir.load(path), out, DATA)
    assert out.with_name(DATA).read_bytes() == mark
    model, values = ir.load(path), np.arange(25_000, dtype=np.float32)
    model.graph.initializers["far"].const_value = ir.tensor(values)
    append_graph(model, path, path.with_name(DATA))
    location, offset, length = places(path)["far"]
    assert (location, length) == (DATA, 100_000) and offset > at
    with path.with_name(DATA).open("rb") as file:
        file.seek(offset)
        assert file.read(length) == values.tobytes()


_MEASURED = """
    import sys, time
    from pathlib import Path
    import onnx_ir as ir
    from nbl_export.graph.external_data import append_graph, write_graph
    source, target, how = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if how == "blocks":
        import os
        del os.copy_file_range
    model = ir.load(source)
    status = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    before, start = status(), time.perf_counter()
    if how == "append":
        append_graph(model, target, target.with_name("model.onnx.data"))
    else:
        write_graph(model, target, "model.onnx.data")
    print(before, status(), time.perf_counter() - start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kernel", "blocks", "append"])
def test_six_gigabytes_take_little_memory(tmp_path: Path, how: str) -> None:
    """Two sparse 3 GiB files with marks in them; VmHWM, since ru_maxrss begins with the parent's."""
    size, count = 3 * 2**30, 4
    part = size // count
    path = tmp_path / "in" / "model.onnx"
    proto = graph_of(
        [
            external(f"w{f}{i}", TensorProto.FLOAT16, [part // 2], (f"{f}.bin", i * part, part))
            for f in "ab"
            for i in range(count)
        ]
    )
    save(proto, path)
    marks = {}
    for f in "ab":
        with (path.parent / f"{f}.bin").open("wb") as file:
            file.truncate(size)
            for i in range(count):
                for at in (0, part // 3, part - 100):
                    marks[f"w{f}{i}", at] = os.urandom(100)
                    file.seek(i * part + at)
                    file.write(marks[f"w{f}{i}", at])
    target = tmp_path / "out" / "model.onnx"
    target.parent.mkdir()
    try:
        result = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(_MEASURED), str(path), str(target), how],
            capture_output=True,
            text=True,
            check=True,
        )
        found = places(target)
        assert max(offset for _, offset, _ in found.values()) > 2**32
        with target.with_name(DATA).open("rb") as file:
            for (name, at), mark in marks.items():
                file.seek(found[name][1] + at)
                assert file.read(100) == mark
    finally:
        shutil.rmtree(target.parent)
    before, peak, seconds = map(float, result.stdout.split())
    print(f"{how}: {peak / 1024:.0f} MiB ({before / 1024:.0f} before), {2 * size / seconds / 1e9:.2f} GB/s")
    assert peak < 300 << 10
    assert peak - before < 50 << 10
