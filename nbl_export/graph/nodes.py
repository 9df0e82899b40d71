"""Make nodes of a graph in order, and weights that are made when they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.graph.io import initializer


class Nodes:
    """Nodes in order, whose results have names that begin with ``prefix``."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.made = prefix, list[ir.Node]()

    def __call__(
        self,
        op: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
        named: str = "",
        outputs: int = 1,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """The first of the ``outputs``, all of this ``dtype``, of a new node."""
        name = f"{self.prefix}/{named or f'{len(self.made)}.{op}'}"
        node = ir.node(op, list(inputs), attributes, domain=domain, num_outputs=outputs, name=name)
        for number, value in enumerate(node.outputs):
            value.name, value.type = (
                f"{name}.{number}" if number else name,
                ir.TensorType(dtype or ir.DataType.FLOAT),
            )
        self.made.append(node)
        return node.outputs[0]

    def number(self, value: Any, dtype: type = np.int64) -> ir.Value:
        array: Any = np.array(value, dtype=dtype)
        return self("Constant", value=ir.tensor(array), dtype=ir.DataType.from_numpy(array.dtype))


def put_in_place(node: ir.Node, made: Sequence[ir.Node]) -> None:
    """Replace ``node`` of a graph by the nodes that were ``made``, the last of which writes its first output."""
    old, new, graph = node.outputs[0], made[-1].outputs[0], node.graph
    assert graph is not None
    new.name, new.type, new.shape = old.name, old.type, old.shape
    node.append(made)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def late_initializer(
    graph: ir.Graph, name: str, shape: Sequence[int], dtype: ir.DataType, made: Callable[[], NDArray[Any]]
) -> ir.Value:
    """The initializer ``name`` of ``graph``: the known one, or one whose array, in this ``shape``, is made when it is
    read, so that not all weights of a large model are in memory.
    """
    if (known := graph.initializers.get(name)) is not None:
        return known

    def compute() -> ir.TensorProtocol:
        return ir.tensor(made().reshape(shape), dtype=dtype, name=name)

    # onnx_ir's annotation asks for a class of its own, its code for the protocol.
    return initializer(graph, ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), name=name), name)  # type: ignore[arg-type]
