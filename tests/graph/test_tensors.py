"""Every tensor of a model is found, and none is followed out of its folder, on reading or on writing."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir
import pytest
from onnx import TensorProto

from nbl_export.errors import BuildError, InputError
from nbl_export.graph.external_data import append_graph, write_graph
from nbl_export.graph.tensors import all_tensors, external_files, source_file
from tests.graph.external_data import DATA, external, graph_of, opened, random_bytes, save


def test_all_tensors_reaches_subgraphs_attributes_and_functions(nested: Path) -> None:
    found = [(where, t.name) for where, t in all_tensors(opened(nested))]
    assert sorted(found) == [
        ("attribute value of node a constant", "w3"),
        ("attribute value of node in a function", "w4"),
        ("w0", "w0"),
        ("w1", "w1"),
        ("w2", "w2"),
    ]
    assert external_files(opened(nested)) == [nested.parent / "source.bin"]


def hostile(folder: Path) -> dict[str, str]:
    """Locations that must never be followed; where they lead there is a file, and it is large enough."""
    outside = folder.parent / "outside.bin"
    outside.write_bytes(b"secret!!" * 100_000)
    inside = folder / "inside.bin"
    inside.write_bytes(outside.read_bytes())
    (folder / "sub").mkdir()
    (folder / "link.bin").symlink_to(outside)
    (folder / "out").symlink_to(folder.parent)
    return {
        "parent": "../outside.bin",
        "absolute": str(outside),
        "absolute inside": str(inside),
        "below and up": "sub/../../outside.bin",
        "link": "link.bin",
        "linked folder": "out/outside.bin",
        "folder": "sub",
        "nothing": "",
        "device": "/dev/zero",
        "NUL": "a\0b",
        "long": "x" * 5000,
        "missing": "absent.bin",
    }


WHERES = ["initializer", "subgraph", "constant", "function"]
_OUTSIDE = ["parent", "absolute", "absolute inside", "below and up", "link", "linked folder", "device"]
_ABSENT = ["folder", "nothing", "missing"]
_UNUSABLE = ["NUL", "long"]


@pytest.mark.parametrize("name", _OUTSIDE + _ABSENT + _UNUSABLE)
@pytest.mark.parametrize("where", WHERES)
def test_hostile_locations_are_refused(nested: Path, two_files: Path, name: str, where: str) -> None:
    path = two_files if where == "initializer" else nested
    location = hostile(path.parent)[name]
    reason = "outside" if name in _OUTSIDE else "missing" if name in _ABSENT else "an invalid file name"
    model = opened(path)
    wanted = {"initializer": "small", "subgraph": "w1", "constant": "w3", "function": "w4"}[where]
    for _, tensor in all_tensors(model):
        if tensor.name == wanted and isinstance(tensor, ir.ExternalTensor):
            tensor._location = location  # what deserializing a hostile protobuf gives
    before = {p: p.read_bytes() for p in path.parent.parent.rglob("*") if p.is_file()}
    for write in (
        lambda: write_graph(model, path.parent / "new.onnx", DATA),
        lambda: write_graph(model, path.parent / "new.onnx", None),
        lambda: append_graph(model, path, path.parent / "source.bin"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            write()
        assert wanted in str(caught.value) or "attribute value" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in path.parent.parent.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [
        (-8, 4000, "truncated"),
        (1, 4000, "truncated"),
        (1 << 63, 4000, "truncated"),
        (0, 3999, "3,999"),
        (0, -1, "-1"),
        (0, 1 << 40, "1,099,511,627,776"),
    ],
)
def test_hostile_ranges_are_refused(tmp_path: Path, offset: int, length: int, message: str) -> None:
    proto = graph_of([external("w", TensorProto.FLOAT, [1000], ("source.bin", 0, 4000))])
    model = ir.load(save(proto, tmp_path / "in.onnx", bytes(4000)))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    tensor._offset, tensor._length = offset, length  # what an older onnx lets through
    with pytest.raises(InputError, match=message):
        write_graph(model, tmp_path / "model.onnx", DATA)
    with pytest.raises(InputError, match=message):
        append_graph(model, tmp_path / "in.onnx", tmp_path / "source.bin")


def test_a_pipe_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "source.bin")
    proto = graph_of([external("w", TensorProto.FLOAT, [1000], ("source.bin", 0, 4000))])
    with pytest.raises(InputError, match=r"source\.bin of w is missing"):
        write_graph(ir.load(save(proto, tmp_path / "in.onnx")), tmp_path / "model.onnx", DATA)


def test_a_link_inside_the_folder_is_followed(tmp_path: Path) -> None:
    proto = graph_of([external("w", TensorProto.FLOAT, [1000], ("link.bin", 0, 4000))])
    path = save(proto, tmp_path / "in" / "model.onnx", random_bytes(4000))
    (path.parent / "link.bin").symlink_to("source.bin")
    model = ir.load(path)
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert source_file("w", tensor) == (path.parent / "source.bin").resolve()
    write_graph(model, tmp_path / "model.onnx", DATA)
    assert (tmp_path / DATA).read_bytes() == random_bytes(4000)


@pytest.mark.parametrize("name", ["", ".", "..", "../out.bin", "sub/out.bin", "/tmp/out.bin", "model.onnx"])
def test_only_plain_names_are_written_to(two_files: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(BuildError, match="plain file name"):
        write_graph(ir.load(two_files), tmp_path / "model.onnx", name)
    assert {p.name for p in tmp_path.iterdir()} == {"source", "sub"}


def test_links_and_folders_are_not_written_through(two_files: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim.bin"
    victim.write_bytes(b"precious")
    folder = tmp_path / "out"
    folder.mkdir()
    for name, make in {
        "link.bin": lambda p: p.symlink_to(victim),
        "dangling.bin": lambda p: p.symlink_to(tmp_path / "new.bin"),
        "folder.bin": Path.mkdir,
        "pipe.bin": os.mkfifo,
    }.items():
        make(folder / name)
        with pytest.raises(BuildError, match="link or not a file"):
            write_graph(ir.load(two_files), folder / "model.onnx", name)
        with pytest.raises(BuildError, match="link or not a file"):
            append_graph(ir.load(two_files), folder / "model.onnx", folder / name)
    assert victim.read_bytes() == b"precious" and not (tmp_path / "new.bin").exists()
    # A graph that is a link is replaced, not written through.
    (folder / "model.onnx").symlink_to(victim)
    write_graph(ir.load(two_files), folder / "model.onnx", DATA)
    assert victim.read_bytes() == b"precious" and not (folder / "model.onnx").is_symlink()
