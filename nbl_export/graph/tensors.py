"""All tensors of a model, wherever they are, and the file that stores each.

Weights are not only initializers of the graph. They are also in subgraphs, Constant nodes and function
bodies. Code that checks or moves a model's external data must see them all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nbl_export.errors import InputError
from nbl_export.files import stays_in

# Where a graph lies, in what is said of it in memory alone.
FOLDER = "nbl_export.folder"


@dataclass(frozen=True)
class Slot:
    """A slot for tensors: an initializer, or an attribute of a node or a function.

    ``where`` names it in messages; ``attribute`` is None for an initializer.
    """

    where: str
    owner: ir.Value | ir.Node | ir.Function
    attribute: ir.Attr | None
    tensors: tuple[ir.TensorProtocol, ...]

    def put(self, tensors: Sequence[ir.TensorProtocol]) -> None:
        """Replace the slot's tensors by ``tensors``, until :meth:`restore`."""
        if isinstance(self.owner, ir.Value):
            self.owner.const_value = tensors[0]
        elif (old := self.attribute) is not None and any(
            a is not b for a, b in zip(tensors, self.tensors, strict=True)
        ):
            value = tensors[0] if old.type == ir.AttributeType.TENSOR else tensors
            self.owner.attributes[old.name] = ir.Attr(old.name, old.type, value, doc_string=old.doc_string)

    def restore(self) -> None:
        if isinstance(self.owner, ir.Value):
            self.owner.const_value = self.tensors[0]
        elif self.attribute is not None:
            self.owner.attributes[self.attribute.name] = self.attribute


def slots(model: ir.Model) -> Iterator[Slot]:
    """Every slot for tensors of the graph, its subgraphs and function bodies."""
    functions = list(model.functions.values())
    bodies: list[ir.Graph | ir.Function] = [model.graph, *functions]
    subgraphs = [graph for body in bodies for graph in body.subgraphs()]
    for graph in (model.graph, *subgraphs):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield Slot(value.name or "an initializer", value, None, (value.const_value,))
    for body in bodies:
        for node in body.all_nodes():
            yield from _attribute_slots(node, f"node {node.name or node.op_type}")
    for function in functions:
        yield from _attribute_slots(function, f"function {function.name}")


def _attribute_slots(owner: ir.Node | ir.Function, where: str) -> Iterator[Slot]:
    for attribute in owner.attributes.values():
        if attribute.is_ref() or attribute.value is None:
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            tensors: tuple[ir.TensorProtocol, ...] = (attribute.value,)
        elif attribute.type == ir.AttributeType.TENSORS:
            tensors = tuple(attribute.value)
        else:
            continue
        yield Slot(f"attribute {attribute.name} of {where}", owner, attribute, tensors)


def all_tensors(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Every tensor of ``model`` with a name for messages.

    Initializers and tensor attributes of the graph, its subgraphs and function bodies; a shared tensor is
    listed for each use.
    """
    for slot in slots(model):
        for tensor in slot.tensors:
            yield slot.where, tensor


def external_files(model: ir.Model) -> list[Path]:
    """The data files that ``model`` reads, in order of first use; they are not opened."""
    external = [t for _, t in all_tensors(model) if isinstance(t, ir.ExternalTensor)]
    return list(dict.fromkeys(Path(t.path) for t in external))


def bytes_read_from(model: ir.Model, file: Path) -> int:
    """The bytes of ``file`` that tensors of ``model`` are stored in, each counted once."""
    external = (t for _, t in all_tensors(model) if isinstance(t, ir.ExternalTensor) and Path(t.path) == file)
    return sum(size for _, size in {(t.offset or 0, t.nbytes) for t in external})


def set_folder(model: ir.Model, folder: Path) -> None:
    """Read every external tensor from ``folder``, including those of function bodies; it is noted in memory."""
    model.meta[FOLDER] = folder
    for _, tensor in all_tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            tensor.base_dir = folder


def follow_links(model: ir.Model) -> Path | None:
    """Resolve the links of all external tensors, in place; returns the common parent folder of their files.

    onnxruntime does not follow a link out of its folder. Returns None without external data.
    """
    files = _source_files(model)
    if not files:
        return None
    folder = Path(os.path.commonpath([file.parent for file in files.values()]))
    _name_from(model, folder, files)
    return folder


def name_from(model: ir.Model, folder: Path) -> None:
    """Name the files of external tensors that lie in ``folder`` or below it by their paths from there, in place."""
    folder = folder.resolve()
    files = {number: file for number, file in _source_files(model).items() if file.is_relative_to(folder)}
    _name_from(model, folder, files)


def _source_files(model: ir.Model) -> dict[int, Path]:
    return {
        id(t): source_file(where, t) for where, t in all_tensors(model) if isinstance(t, ir.ExternalTensor)
    }


def _name_from(model: ir.Model, folder: Path, files: Mapping[int, Path]) -> None:
    def real(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not isinstance(tensor, ir.ExternalTensor) or id(tensor) not in files:
            return tensor
        location = files[id(tensor)].relative_to(folder)
        return ir.ExternalTensor(
            location,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=tensor.name,
            base_dir=folder,
        )

    for slot in list(slots(model)):
        slot.put([real(tensor) for tensor in slot.tensors])


def source_file(where: str, tensor: ir.ExternalTensor) -> Path:
    """The resolved path of the file that stores ``tensor``.

    Raises :class:`InputError` if it is missing, too short, or outside the tensor's folder; such a file is
    never opened.
    """
    location = Path(tensor.location)
    folder = Path(tensor.base_dir or ".").resolve()
    try:
        target = (folder / location).resolve()
        inside = not location.is_absolute() and stays_in(folder, target)
        present = inside and target.is_file()
    except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, a loop of links
        raise InputError(
            f"The external data of {where} has an invalid file name ({str(location)!r}): export the model again."
        ) from None
    if not inside:
        raise InputError(
            f"The external data of {where} lies outside its folder ({location}) and is not read: move it there."
        )
    if not present:
        raise InputError(f"The external data {location} of {where} is missing: put the file into {folder}.")
    _check_range(where, tensor, target)
    return target


def check_tensor(where: str, tensor: ir.TensorProtocol) -> None:
    """Raises :class:`InputError` for no type, an impossible shape, or other numbers in the graph than the shape says.

    A shape is impossible with a negative size, or 2^62 elements or more.
    """
    if tensor.dtype == ir.DataType.UNDEFINED:
        raise InputError(f"{where} has no type: export the model again.")
    sizes = tensor.shape.numpy()
    if any(size < 0 for size in sizes) or math.prod(sizes) >= 1 << 62:
        shown = ", ".join(map(str, sizes[:4])) + (", …" if len(sizes) > 4 else "")
        raise InputError(f"{where} has the impossible shape [{shown}]: export the model again.")
    if isinstance(tensor, ir.serde.TensorProtoTensor) and not _fits(tensor):
        raise InputError(f"{where} has other numbers than its type and shape say: export the model again.")


def _fits(tensor: ir.serde.TensorProtoTensor) -> bool:
    if tensor.raw.HasField("raw_data"):
        return len(tensor.raw.raw_data) == tensor.nbytes
    try:  # numbers in fields of their type: few
        tensor.numpy()
    except (ValueError, TypeError):
        return False
    return True


def _check_range(where: str, tensor: ir.ExternalTensor, target: Path) -> None:
    if tensor.dtype == ir.DataType.STRING:
        raise InputError(
            f"{where} has its strings in external data, which ONNX forbids: export the model again."
        )
    offset, length = tensor.offset or 0, tensor.nbytes if tensor.length is None else tensor.length
    if length != tensor.nbytes:
        raise InputError(
            f"{where} has {tensor.nbytes:,} bytes, its external data {length:,}: export the model again."
        )
    size = target.stat().st_size
    if offset < 0 or offset + length > size:
        raise InputError(
            f"{target} is truncated: {where} is at bytes {offset:,} to {offset + length:,}, the file has {size:,}; "
            "export the model again."
        )


def int64_initializer(graph: ir.Graph, name: str, numbers: int | Sequence[int]) -> ir.Value:
    """An int64 initializer [] or [n] of ``graph``; equal values share one initializer.

    It is called ``name`` or, if that name is used for other values, ``name``.1, .2 and so on.
    """
    array = np.array(numbers, dtype=np.int64)
    for free in chain([name], (f"{name}.{i}" for i in count(1))):
        known = graph.initializers.get(free)
        if known is None:
            tensor = ir.tensor(array, name=free)
            value = ir.Value(
                name=free, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
            )
            graph.register_initializer(value)
            return value
        if known.const_value is not None and np.array_equal(known.const_value.numpy(), array):
            return known
    raise AssertionError  # there is always another name
