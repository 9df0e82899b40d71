"""The embedding of a decoder whose graph reads embeddings: a graph beside it or one folder above."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from nbl_export.batch import EMBEDDINGS, F32, I64, TOKENS
from nbl_export.errors import InputError
from nbl_export.graph.io import FOLDER, int64_initializer, load_graph, save_again
from nbl_export.graph.operators import remove_unused, upstream

NAME = "embedding.onnx"
# What may happen to ids and rows: other ids are looked up, rows are scaled, in their precision, and cut by layers.
_BESIDE = {"Mul", "Cast", "Reshape", "Shape", "Gather", "Concat", "Unsqueeze", "Squeeze", "Slice"}
_BESIDE |= {"Where", "And", "Or", "Not", "Less", "GreaterOrEqual", "Equal", "Identity", "Constant", "Expand"}
FEATURES = {"image": "image_features", "audio": "audio_features"}
_TOKENS_OF = "num_{}_tokens"
_OWN = "nbl_export"  # the domain of an operator that is run here alone


def _first_lookup(value: ir.Value) -> ir.Node | None:
    """The node that chooses the rows of a table that ``value`` is made of, which may be scaled."""
    makers = (value.producer() for value in upstream(value))
    return next((node for node in makers if node is not None and node.op_type == "Gather"), None)


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
    text = (v for v in upstream(value) if (node := v.producer()) is None or node.op_type != "ScatterND")
    return next(text)


class Embedding:
    """Computes the embeddings of token ids by the graph at ``path``; rows of its tables are read when needed."""

    def __init__(self, path: Path) -> None:
        from onnx.reference import ReferenceEvaluator

        model = load_graph(path)
        graph = model.graph
        self._names = [str(value.name) for value in graph.outputs]
        # Without what is put in the places of images and sounds.
        ids = graph.inputs[0]
        graph.outputs[:] = [_of_text(value) for value in graph.outputs]
        graph.inputs[:] = [ids]
        if first := _first_lookup(graph.outputs[0]):
            first.replace_input_with(1, ids)
        remove_unused(model)
        tables = {n: t for n in graph if n.op_type == "Gather" and (t := n.inputs[0].const_value) is not None}  # type: ignore[union-attr]
        if len(tables) != len(self._names) or not {n.op_type for n in graph if n not in tables} <= _BESIDE:
            raise InputError(f"{path} is no embedding of nbl-export: export the model again.")
        for number, node in enumerate(tables):
            rows = ir.node("Rows", [node.inputs[1]], {"table": number}, domain=_OWN)
            node.append(rows)
            ir.convenience.replace_all_uses_with(node.outputs[0], rows.outputs[0], replace_graph_outputs=True)
        remove_unused(model)
        model.opset_imports[_OWN] = 1
        self._run = ReferenceEvaluator(ir.to_proto(model), new_ops=[_rows_of(list(tables.values()))]).run

    def __call__(self, ids: I64) -> dict[str, F32]:
        """The outputs of the graph by name: inputs_embeds [batch, seq, d], and per_layer_inputs where it has such."""
        found = self._run(None, {TOKENS: np.asarray(ids)})
        return {n: np.ascontiguousarray(a, np.float32) for n, a in zip(self._names, found, strict=True)}


def _rows_of(tables: Sequence[Any]) -> Any:
    """The operator that looks rows up in one of ``tables``, which stay on the disk."""
    from onnx.reference.op_run import OpRun

    class Rows(OpRun):  # type: ignore[misc]
        op_domain = _OWN

        def _run(self, ids: I64, table: int) -> tuple[Any]:
            rows = tables[table].numpy()
            if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(rows):
                raise InputError(f"{NAME} has {len(rows):,} tokens, and none with the id {int(ids.max()):,}.")
            return (np.asarray(rows[ids]),)

    return Rows


def embedding_of(model: ir.Model) -> Embedding:
    """The embedding of a graph that reads embeddings; raises :class:`InputError` if there is none."""
    folder = model.meta.get(FOLDER)
    for place in (folder / NAME, folder.parent / NAME) if folder is not None else ():
        if place.is_file():
            return Embedding(place)
    raise InputError(
        f"The graph reads {EMBEDDINGS}, and {NAME}, which makes them of token ids, is not beside it: put it there."
    )
