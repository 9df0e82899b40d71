"""Reading ONNX files that may be broken or hostile, and writing them all or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from nbl_export.errors import BuildError, InputError
from nbl_export.graph import io
from nbl_export.graph.io import check_file, load_graph, save_graph, scratch_copy
from tests.interruptions import killed_at_change

DATA = "model.onnx.data"


@pytest.fixture
def graph(tiny_graph: Path, tmp_path: Path) -> Path:
    """A copy of the tiny graph with its data, to be damaged."""
    folder = tmp_path / "graph"
    folder.mkdir()
    for file in tiny_graph.parent.iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder / "model.onnx"


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def edit_external(path: Path, change: Callable[[dict[str, str]], None]) -> None:
    """Rewrite the external-data entry of the initializer that lies last in the data file."""
    proto = onnx.load(str(path), load_external_data=False)
    external = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    entries = {t.name: {e.key: e.value for e in t.external_data} for t in external}
    tensor = max(external, key=lambda t: int(entries[t.name].get("offset", 0)))
    fields = entries[tensor.name]
    change(fields)
    del tensor.external_data[:]
    for key, value in fields.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("dims", "kind", "message"),
    [
        ([-1], onnx.TensorProto.FLOAT, r"w has the impossible shape \[-1\]"),
        ([2**31, 2**31], onnx.TensorProto.FLOAT, r"w has the impossible shape"),
        ([1] * 5, onnx.TensorProto.UNDEFINED, r"w has no type"),
        ([1], 99, r"is not a readable ONNX file"),
        ([0], onnx.TensorProto.FLOAT, r"w has other numbers than its type and shape say"),
        ([2], onnx.TensorProto.FLOAT, r"w has other numbers than its type and shape say"),
        ([3], onnx.TensorProto.INT8, r"w has other numbers than its type and shape say"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(graph: Path, dims: list[int], kind: int, message: str) -> None:
    proto = onnx.load(str(graph), load_external_data=False)
    tensor = proto.graph.initializer.add()
    tensor.name, tensor.data_type, tensor.raw_data = "w", kind, bytes(4)
    tensor.dims[:] = dims
    graph.write_bytes(proto.SerializeToString())
    with pytest.raises(InputError, match=message):
        load_graph(graph)


def test_numbers_in_a_field_of_their_type_are_counted_too(graph: Path) -> None:
    proto = onnx.load(str(graph), load_external_data=False)
    tensor = proto.graph.initializer.add()
    tensor.name, tensor.data_type = "w", onnx.TensorProto.FLOAT
    tensor.float_data[:] = [1, 2, 3]
    for dims, right in (([3], True), ([1, 3], True), ([2], False), ([4], False), ([], False)):
        tensor.dims[:] = dims
        graph.write_bytes(proto.SerializeToString())
        if right:
            load_graph(graph)
        else:
            with pytest.raises(InputError, match="w has other numbers than its type and shape say"):
                load_graph(graph)


def test_weights_are_read_as_they_are(graph: Path) -> None:
    reference = onnx.load(str(graph))
    model = load_graph(graph)
    assert len(model.graph.initializers) == len(reference.graph.initializer)
    for tensor in reference.graph.initializer:
        value = model.graph.initializers[tensor.name].const_value
        assert value is not None
        assert np.array_equal(value.numpy(), onnx.numpy_helper.to_array(tensor))


# refusals ----------------------------------------------------------------------------------------


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.onnx does not exist"):
        load_graph(tmp_path / "absent.onnx")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.95, 0.9999])
def test_truncated_file_is_refused(graph: Path, share: float) -> None:
    raw = graph.read_bytes()
    graph.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(InputError, match=r"not a (readable|usable) ONNX") as caught:
        load_graph(graph)
    assert "\n" not in str(caught.value) and str(graph) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"this is a text file\n" * 50, b"\0" * 4096, b'{"model": "llama"}', b"\x89PNG\r\n\x1a\n" + bytes(64)],
    ids=["text", "zeros", "json", "png"],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"not a (readable|usable) ONNX"):
        load_graph(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(InputError, match="does not exist"):
        load_graph(tmp_path / "model.onnx")


def test_missing_external_data_is_refused(graph: Path) -> None:
    graph.with_name(DATA).unlink()
    with pytest.raises(InputError, match=rf"external data {DATA} of .* is missing"):
        load_graph(graph)


def test_truncated_external_data_is_refused(graph: Path) -> None:
    data = graph.with_name(DATA)
    size = data.stat().st_size
    with data.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(InputError, match="is truncated") as caught:
        load_graph(graph)
    assert f"{size:,}" in str(caught.value) and f"{size - 1:,}" in str(caught.value)


@pytest.mark.parametrize("where", ["parent", "absolute", "below and up again", "link"])
def test_external_data_outside_the_folder_is_never_opened(graph: Path, where: str) -> None:
    outside = graph.parent.parent / "outside.data"
    shutil.copyfile(graph.with_name(DATA), outside)
    (graph.parent / "sub").mkdir()
    locations = {
        "parent": "../outside.data",
        "absolute": str(outside),
        "below and up again": "sub/../../outside.data",
        "link": "link.data",
    }
    if where == "link":
        (graph.parent / "link.data").symlink_to(outside)
    edit_external(graph, lambda fields: fields.update(location=locations[where]))
    with pytest.raises(InputError, match="lies outside its folder"):
        load_graph(graph)


@pytest.mark.parametrize(
    "change",
    [{"offset": "-4096"}, {"length": "999999999"}, {"offset": "999999999"}, {"length": "16"}],
    ids=str,
)
def test_external_ranges_that_do_not_fit_are_refused(graph: Path, change: dict[str, str]) -> None:
    edit_external(graph, lambda fields: fields.update(change))
    with pytest.raises(InputError):
        load_graph(graph)


def test_truncated_external_data_is_noticed_without_a_length(graph: Path) -> None:
    """The format lets a tensor say only where its data begins."""
    edit_external(graph, lambda fields: fields.pop("length"))
    load_graph(graph)
    data = graph.with_name(DATA)
    with data.open("r+b") as file:
        file.truncate(data.stat().st_size - 4)
    with pytest.raises(InputError, match="is truncated"):
        load_graph(graph)


# writing -----------------------------------------------------------------------------------------


def test_saved_graph_is_the_same_graph(graph: Path, tmp_path: Path) -> None:
    written = save_graph(load_graph(graph), tmp_path / "new" / "model.onnx")
    assert written == [tmp_path / "new" / "model.onnx", tmp_path / "new" / DATA]
    assert names(tmp_path / "new") == {"model.onnx", DATA}
    check_file(written[0])
    before, after = onnx.load(str(graph)), onnx.load(str(written[0]))
    assert [n.op_type for n in before.graph.node] == [n.op_type for n in after.graph.node]
    arrays = [{t.name: onnx.numpy_helper.to_array(t) for t in g.graph.initializer} for g in (before, after)]
    assert arrays[0].keys() == arrays[1].keys()
    assert all(np.array_equal(arrays[0][n], arrays[1][n]) for n in arrays[0])


def test_a_graph_can_be_saved_over_its_own_file(graph: Path) -> None:
    """Its weights are still mapped from the data file that is being replaced."""
    expected = onnx.load(str(graph))
    save_graph(load_graph(graph), graph)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(str(graph)).graph.initializer}
    for tensor in expected.graph.initializer:
        assert np.array_equal(found[tensor.name], onnx.numpy_helper.to_array(tensor))


def test_stale_data_goes_when_a_graph_needs_little(graph: Path) -> None:
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    small = ir.Model(
        ir.Graph([x], [node.outputs[0]], nodes=[node], opset_imports={"": 23}, name="small"), ir_version=10
    )
    save_graph(small, graph, check=lambda path: None)
    assert len(load_graph(graph).graph) == 1
    data = graph.with_name(DATA)
    assert not data.exists() or data.stat().st_size == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_pair(
    graph: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = {n: (graph.parent / n).read_bytes() for n in names(graph.parent)}
    model = load_graph(graph)

    def fail(_model: Any, path: Path, data: str, **_options: Any) -> None:
        path.write_bytes(b"half a gra")
        path.with_name(data).write_bytes(b"half the da")
        raise error

    monkeypatch.setattr(io, "write_graph", fail)
    with pytest.raises(type(error)):
        save_graph(model, graph)
    assert {n: (graph.parent / n).read_bytes() for n in names(graph.parent)} == before


def test_no_kill_leaves_the_old_graph_with_new_data(graph: Path) -> None:
    """It would load, and compute something else."""
    model, data = load_graph(graph), graph.with_name(DATA)
    model.doc_string = "new"
    for value in model.graph.initializers.values():
        value.const_value = ir.tensor(np.zeros_like(value.const_value.numpy()), name=value.name)  # type: ignore[union-attr]
    before = {path: path.read_bytes() for path in (graph, data)}
    for number in count():
        for path, content in before.items():
            path.write_bytes(content)
        killed = killed_at_change(
            number, graph.parent, lambda: save_graph(model, graph, check=lambda path: None)
        )
        if graph.exists():
            assert (graph.read_bytes() == before[graph]) == (data.read_bytes() == before[data]), number
        if not killed:
            break
    assert number > 20 and graph.read_bytes() != before[graph]


def test_a_saved_graph_is_on_the_disk_before_its_name_is(
    graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        events.append(f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append(f"rename {target.name}")
        return real_replace(self, target)

    model = load_graph(graph)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    save_graph(model, graph, check=lambda path: None)
    # After the old graph is gone.
    assert events[-7:] == [
        "sync graph",
        f"sync {DATA}",
        f"rename {DATA}",
        "sync graph",
        "sync model.onnx",
        "rename model.onnx",
        "sync graph",
    ]


def test_a_failed_first_save_leaves_nothing(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_graph(graph)

    def fail(*_args: Any, **_options: Any) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(io, "write_graph", fail)
    with pytest.raises(OSError, match="File too large"):
        save_graph(model, tmp_path / "new" / "model.onnx")
    assert names(tmp_path / "new") == set()


# checking ----------------------------------------------------------------------------------------


def test_checker_refuses_what_onnx_refuses(graph: Path) -> None:
    check_file(graph)
    proto = onnx.load(str(graph), load_external_data=False)
    proto.graph.node[-1].op_type = "NoSuchOperator"
    graph.write_bytes(proto.SerializeToString())
    with pytest.raises(BuildError, match="does not pass the ONNX checker") as caught:
        check_file(graph)
    assert "\n" not in str(caught.value)


def test_checker_infers_shapes_strictly(graph: Path) -> None:
    proto = onnx.load(str(graph), load_external_data=False)
    # The head's weight is [vocab, width]; with another perm its product with the activations is none.
    head = next(n for n in proto.graph.node if n.op_type == "Transpose" and n.output[0] in _head_input(proto))
    del head.attribute[:]
    head.attribute.append(onnx.helper.make_attribute("perm", [0, 1]))
    graph.write_bytes(proto.SerializeToString())
    with pytest.raises(BuildError, match="does not pass the ONNX checker"):
        check_file(graph)


def _head_input(proto: onnx.ModelProto) -> list[str]:
    return list(next(n for n in proto.graph.node if "logits" in n.output).input)


# changed copies ----------------------------------------------------------------------------------


def test_a_scratch_copy_lives_for_the_block_only(graph: Path) -> None:
    before = names(graph.parent)

    def rename(model: ir.Model) -> None:
        model.graph.outputs[0].name = "scores"

    with scratch_copy(graph, rename) as copy:
        assert copy.parent == graph.parent  # beside its data
        outputs = [o.name for o in onnx.load(str(copy), load_external_data=False).graph.output]
        assert "scores" in outputs and "logits" not in outputs
        assert copy.stat().st_size < 100_000  # the weights were not copied
    assert names(graph.parent) == before
    assert load_graph(graph).graph.outputs[0].name == "logits"


def test_a_scratch_copy_goes_after_an_error_in_the_block(graph: Path) -> None:
    before = names(graph.parent)
    with pytest.raises(RuntimeError, match="inside"), scratch_copy(graph, lambda _model: None):
        raise RuntimeError("inside")
    assert names(graph.parent) == before


def test_a_scratch_copy_goes_when_it_cannot_be_written(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(graph.parent)

    def fail(*_args: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", fail)
    with pytest.raises(OSError, match="No space"), scratch_copy(graph, lambda _model: None):
        pytest.fail("the block must not be entered")
    assert names(graph.parent) == before
