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
from nbl_export.graph.io import load_graph, save_again
from nbl_export.graph.tensors import FOLDER, int64_initializer

NAME = "embedding.onnx"
# What may happen to ids and rows: other ids are looked up, rows are scaled, in their precision, and cut by layers.
_BESIDE = {"Mul", "Cast", "Reshape", "Shape", "Gather", "Concat", "Unsqueeze", "Squeeze", "Slice"}
_BESIDE |= {"Where", "And", "Or", "Not", "Less", "GreaterOrEqual", "Equal", "Identity", "Constant", "Expand"}
FEATURES = {"image": "image_features", "audio": "audio_features"}
_TOKENS_OF = "num_{}_tokens"


def _first_lookup(value: ir.Value) -> ir.Node | None:
    """The node that chooses the rows of a table that ``value`` is made of, which may be scaled."""
    while (node := value.producer()) is not None and node.op_type != "Gather":
        if node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return node


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
    gather = _first_lookup(output)
    assert gather is not None
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
        graph.outputs[0] = embedded
        output.name, embedded.name = "embeddings_of_text", EMBEDDINGS
        graph.sort()
    return save_again(model, path)


def _of_text(value: ir.Value) -> ir.Value:
    """What the embedding computes of token ids, before anything is put among it."""
    while (
        (node := value.producer()) is not None and node.op_type == "ScatterND" and node.inputs[0] is not None
    ):
        value = node.inputs[0]
    return value


def _lookups(model: ir.Model) -> list[ir.Node]:
    """The nodes that choose rows of a table, each that leads to one of the outputs."""
    return [
        node
        for node in model.graph
        if node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].const_value is not None
    ]


class Embedding:
    """Computes the embeddings of token ids by the graph at ``path``; rows of its tables are read when needed."""

    def __init__(self, path: Path) -> None:
        self._names = [str(value.name) for value in load_graph(path).graph.outputs]
        model = self._of_ids(path)
        lookups = _lookups(model)
        others = {node.op_type for node in model.graph if node not in lookups}
        if len(lookups) != len(self._names) or not others <= _BESIDE:
            raise InputError(f"{path} is no embedding of nbl-export: export the model again.")
        self._tables: list[Any] = [n.inputs[0].const_value for n in lookups if n.inputs[0] is not None]
        self._indices, self._rest = self._of_indices(path), self._of_rows(path)

    @staticmethod
    def _of_ids(path: Path) -> ir.Model:
        """The graph without what is put in the places of images and sounds."""
        model = load_graph(path)
        graph = model.graph
        ids = graph.inputs[0]
        graph.outputs[:] = [_of_text(value) for value in graph.outputs]
        graph.inputs[:] = [ids]
        if graph.outputs and (first := _first_lookup(graph.outputs[0])) is not None:
            first.replace_input_with(1, ids)
        passes.RemoveUnusedNodesPass()(model)
        return model

    def _of_indices(self, path: Path) -> Any:
        """Computes the rows that are looked up in each table."""
        from onnx.reference import ReferenceEvaluator

        model = self._of_ids(path)
        found = [node.inputs[1] for node in _lookups(model)]
        model.graph.outputs[:] = []
        for number, value in enumerate(found):
            same = ir.node("Identity", [value], name=f"rows.{number}")
            same.outputs[0].name = f"rows.{number}"
            model.graph.append(same)
            model.graph.outputs.append(same.outputs[0])
        passes.RemoveUnusedNodesPass()(model)
        return ReferenceEvaluator(ir.to_proto(model))

    def _of_rows(self, path: Path) -> Any:
        """Computes the outputs of the rows."""
        from onnx.reference import ReferenceEvaluator

        model = self._of_ids(path)
        graph = model.graph
        for number, node in enumerate(_lookups(model)):
            table = node.inputs[0]
            assert table is not None and table.dtype is not None
            rows = ir.Value(
                name=f"rows.{number}", type=ir.TensorType(table.dtype), shape=ir.Shape(["b", "s", "d"])
            )
            graph.inputs.append(rows)
            same = ir.node("Identity", [rows])
            node.append(same)
            ir.convenience.replace_all_uses_with(node.outputs[0], same.outputs[0], replace_graph_outputs=True)
            graph.remove(node, safe=True)
            graph.initializers.pop(str(table.name), None)
        passes.RemoveUnusedNodesPass()(model)
        return ReferenceEvaluator(ir.to_proto(model))

    def __call__(self, ids: I64) -> dict[str, F32]:
        """The outputs of the graph by name: inputs_embeds [batch, seq, d], and per_layer_inputs where it has such."""
        ids = np.asarray(ids)
        rows: dict[str, NDArray[Any]] = {}
        for number, index in enumerate(self._indices.run(None, {TOKENS: ids})):
            table = self._tables[number].numpy()
            if index.size and not 0 <= int(index.min()) <= int(index.max()) < len(table):
                raise InputError(
                    f"{NAME} has {len(table):,} tokens, and none with the id {int(index.max()):,}."
                )
            rows[f"rows.{number}"] = np.asarray(table[index])
        found = self._rest.run(None, {TOKENS: ids, **rows})
        return {
            name: np.ascontiguousarray(value, dtype=np.float32)
            for name, value in zip(self._names, found, strict=True)
        }


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
