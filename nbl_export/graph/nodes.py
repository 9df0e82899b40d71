"""Make nodes of a graph in order."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


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
