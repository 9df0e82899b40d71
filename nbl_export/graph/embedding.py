"""The embedding of a decoder whose graph reads embeddings: a graph beside it or one folder above."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from nbl_export.batch.arrays import F32, I64
from nbl_export.batch.names import EMBEDDINGS, TOKENS
from nbl_export.errors import InputError
from nbl_export.graph.io import append_graph, load_graph
from nbl_export.graph.tensors import FOLDER, int64_initializer

NAME = "embedding.onnx"
# What may happen to the rows of the table: they are scaled, in their precision.
_SCALED = {"Mul", "Cast"}
FEATURES = {"image": "image_features", "audio": "audio_features"}
_TOKENS_OF = "num_{}_tokens"


def reads_embeddings(model: ir.Model) -> bool:
    """Whether the graph reads embeddings and no token ids."""
    names = {v.name for v in model.graph.inputs}
    return EMBEDDINGS in names and TOKENS not in names


def add_features(path: Path, placeholders: Mapping[str, int]) -> list[Path]:
    """Give the embedding at ``path`` inputs for what stands in the places of images and sounds; returns its files.

    ``placeholders`` are the tokens of these places by a key of :data:`FEATURES`. The input of each is
    [tokens, d] float32, one row for each such token of the batch, in order; more or fewer are an error when it is run.
    """
    model = load_graph(path)
    graph = model.graph
    ids, output = graph.inputs[0], graph.outputs[0]
    gather = next(node for node in graph if node.op_type == "Gather")
    table = gather.inputs[0]
    assert table is not None and table.shape is not None and output.shape is not None
    known, width = table.shape[0], output.shape[2]
    embedded = output
    for kind, token in placeholders.items():
        features = ir.Value(
            name=FEATURES[kind],
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([_TOKENS_OF.format(kind), width]),
        )
        graph.inputs.append(features)
        here = ir.node("Equal", [ids, int64_initializer(graph, f"{kind}_token", token)])
        graph.append(here)
        if isinstance(known, int) and token >= known:  # such a token has no row
            first = int64_initializer(graph, f"{kind}_row", 0)
            looked_up = ir.node("Where", [here.outputs[0], first, gather.inputs[1]])
            graph.append(looked_up)
            gather.replace_input_with(1, looked_up.outputs[0])
        places = ir.node("NonZero", [here.outputs[0]])
        rows = ir.node("Transpose", [places.outputs[0]], {"perm": [1, 0]})
        put = ir.node("ScatterND", [embedded, rows.outputs[0], features])
        graph.extend([places, rows, put])
        put.outputs[0].type, put.outputs[0].shape = output.type, output.shape
        embedded = put.outputs[0]
    if embedded is not output:
        graph.outputs[:] = [embedded]
        output.name, embedded.name = "embeddings_of_text", EMBEDDINGS
        graph.sort()
    return append_graph(model, path)


def _of_text(graph: ir.Graph) -> ir.Value:
    """What the embedding computes of token ids, before anything is put among it."""
    value = graph.outputs[0]
    while (
        (node := value.producer()) is not None and node.op_type == "ScatterND" and node.inputs[0] is not None
    ):
        value = node.inputs[0]
    return value


class Embedding:
    """Computes ``inputs_embeds`` of token ids by the graph at ``path``; rows of its table are read when needed."""

    def __init__(self, path: Path) -> None:
        from onnx.reference import ReferenceEvaluator

        model = load_graph(path)
        gather = next((n for n in model.graph if n.op_type == "Gather"), None)
        table = gather.inputs[0] if gather is not None else None
        model.graph.outputs[:] = [_of_text(model.graph)]
        if gather is not None:
            gather.replace_input_with(1, model.graph.inputs[0])
        passes.RemoveUnusedNodesPass()(model)
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
