"""Find all tensors of a model, wherever they are, and the file that stores each.

Weights are not only initializers of the graph. They are also in subgraphs, Constant nodes and function
bodies. Code that checks or moves a model's external data must see them all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.errors import InputError
from nbl_export.files import stays_in

# Where a graph lies, in what is said of it in memory alone.
FOLDER = "nbl_export.folder"


@dataclass(frozen=True)
class Slot:
    """The place of a ``tensor``: an initializer, or the ``attribute`` of a node. ``where`` names it in messages."""

    where: str
    tensor: ir.TensorProtocol
    owner: ir.Value | ir.Node
    attribute: ir.Attr | None = None

    def put(self, tensor: ir.TensorProtocol) -> None:
        """Replace the tensor by another, or put it back."""
        if isinstance(self.owner, ir.Value):
            self.owner.const_value = tensor
        elif (old := self.attribute) is not None:
            new = old if tensor is self.tensor else ir.AttrTensor(old.name, tensor, doc_string=old.doc_string)
            self.owner.attributes[old.name] = new


def slots(model: ir.Model) -> Iterator[Slot]:
    """Every place of a tensor in the graph, its subgraphs and function bodies."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield Slot(value.name or "an initializer", value.const_value, value)
    bodies: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for body in bodies:
        for node in body.all_nodes():
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                    where = f"attribute {attribute.name} of node {node.name or node.op_type}"
                    yield Slot(where, attribute.as_tensor(), node, attribute)


def external_tensors(model: ir.Model) -> Iterator[tuple[str, ir.ExternalTensor]]:
    """Every tensor of ``model`` in a data file, with a name for messages; a shared one is listed for each use."""
    for slot in slots(model):
        if isinstance(slot.tensor, ir.ExternalTensor):
            yield slot.where, slot.tensor


def external_files(model: ir.Model) -> list[Path]:
    """The data files that ``model`` reads, in order of first use; they are not opened."""
    return list(dict.fromkeys(Path(tensor.path) for _, tensor in external_tensors(model)))


def set_folder(model: ir.Model, folder: Path) -> None:
    """Read every external tensor from ``folder``; it is noted in memory."""
    model.meta[FOLDER] = folder
    for _, tensor in external_tensors(model):
        tensor.base_dir = folder


def follow_links(model: ir.Model, folder: Path | None = None) -> Path | None:
    """Name external files by their real paths from ``folder``, in place, if they lie in it or below it.

    onnxruntime does not follow a link out of its folder. Without a ``folder``, it is the common parent of the files.
    Returns it, and None without external data.
    """
    files = {id(tensor): source_file(where, tensor) for where, tensor in external_tensors(model)}
    if not files:
        return None
    if folder is None:
        folder = Path(os.path.commonpath([file.parent for file in files.values()]))
    for slot in list(slots(model)):
        file, tensor = files.get(id(slot.tensor)), slot.tensor
        if file is not None and file.is_relative_to(folder) and isinstance(tensor, ir.ExternalTensor):
            slot.put(reference(tensor, folder, file.relative_to(folder), tensor.offset))
    return folder


def reference(
    tensor: ir.TensorProtocol, folder: Path, location: str | Path, offset: int | None
) -> ir.ExternalTensor:
    """``tensor`` as one whose bytes are in the file ``location`` of ``folder``, from ``offset`` on."""
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
        base_dir=folder,
    )


def source_file(where: str, tensor: ir.ExternalTensor) -> Path:
    """The resolved path of the file that stores ``tensor``, called ``where``.

    Raises :class:`InputError` if it is missing, too short, or outside the tensor's folder; such a file is never opened.
    """
    location, folder = Path(tensor.location), Path(tensor.base_dir or ".").resolve()
    target = (folder / location).resolve()
    if location.is_absolute() or not stays_in(folder, target):
        raise InputError(
            f"The external data of {where} lies outside its folder ({location}) and is not read: move it there."
        )
    if not target.is_file():
        raise InputError(f"The external data {location} of {where} is missing: put the file into {folder}.")
    offset, length, size = tensor.offset or 0, tensor.nbytes, target.stat().st_size
    if offset < 0 or offset + length > size or tensor.length not in (None, length):
        raise InputError(
            f"{target} is truncated or another graph's: {where} is at bytes {offset:,} to {offset + length:,}, the "
            f"file has {size:,}; export the model again."
        )
    return target


def int64_initializer(graph: ir.Graph, name: str, numbers: int | Sequence[int]) -> ir.Value:
    """An int64 initializer [] or [n] of ``graph``; equal values share one initializer.

    It is called ``name`` or, if that name is used for other values, ``name``.1, .2 and so on.
    """
    array, free, numbered = np.array(numbers, dtype=np.int64), name, count(1)
    while (known := graph.initializers.get(free)) is not None:
        if known.const_value is not None and np.array_equal(known.const_value.numpy(), array):
            return known
        free = f"{name}.{next(numbered)}"
    tensor = ir.tensor(array, name=free)
    value = ir.Value(
        name=free, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value
