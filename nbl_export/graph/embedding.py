"""The embedding of a decoder whose graph reads embeddings: a graph beside it or one folder above."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32, I64
from nbl_export.batch.names import EMBEDDINGS, TOKENS
from nbl_export.errors import InputError
from nbl_export.graph.io import load_graph
from nbl_export.graph.tensors import FOLDER

NAME = "embedding.onnx"
# What may happen to the rows of the table: they are scaled, in their precision.
_SCALED = {"Mul", "Cast"}


def reads_embeddings(model: ir.Model) -> bool:
    """Whether the graph reads embeddings and no token ids."""
    names = {v.name for v in model.graph.inputs}
    return EMBEDDINGS in names and TOKENS not in names


class Embedding:
    """Computes ``inputs_embeds`` of token ids by the graph at ``path``; rows of its table are read when needed."""

    def __init__(self, path: Path) -> None:
        from onnx.reference import ReferenceEvaluator

        model = load_graph(path)
        gather = next((n for n in model.graph if n.op_type == "Gather"), None)
        table = gather.inputs[0] if gather is not None else None
        others = {node.op_type for node in model.graph if node is not gather}
        if gather is None or table is None or table.const_value is None or not others <= _SCALED:
            raise InputError(f"{path} is no embedding of nbl-export: export the model again.")
        self._table = table.const_value
        self._name = str(gather.outputs[0].name)
        graph = model.graph
        self._rest: Any = None
        if gather.outputs[0] in graph.outputs:
            return
        found = gather.outputs[0]
        found.name = self._name
        gather_input = ir.Value(
            name=self._name, type=ir.TensorType(self._table.dtype), shape=ir.Shape(["b", "s", "d"])
        )
        ir.convenience.replace_all_uses_with(found, gather_input)
        graph.remove(gather, safe=True)
        graph.inputs[:] = [gather_input]
        graph.initializers.pop(str(table.name), None)
        self._rest = ReferenceEvaluator(ir.to_proto(model))

    def __call__(self, ids: I64) -> F32:
        table = self._table.numpy()
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(table):
            raise InputError(f"{NAME} has {len(table):,} tokens, and none with the id {int(ids.max()):,}.")
        rows: NDArray[Any] = np.asarray(table[np.asarray(ids)])
        if self._rest is not None:
            rows = self._rest.run(None, {self._name: rows})[0]
        return np.ascontiguousarray(rows, dtype=np.float32)


def embedding_of(model: ir.Model) -> Embedding:
    """The embedding of a graph that reads embeddings; raises :class:`InputError` if there is none."""
    folder = model.meta.get(FOLDER)
    places = [folder / NAME, folder.parent / NAME] if folder is not None else []
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise InputError(
            f"The graph reads {EMBEDDINGS}, and {NAME}, which makes them of token ids, is not beside it: put it there."
        )
    return Embedding(path)
