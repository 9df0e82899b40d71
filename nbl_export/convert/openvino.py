"""Write model + plan as a folder that openvino-genai loads: OpenVINO's own file, with the cache as states.

    traced and rewritten graph            openvino_model.xml
    input past, output present      ──▶   a state each, whose rows `beam_idx` picks
    Attention, grouped heads        ──▶   ScaledDotProductAttention, for which OpenVINO has a kernel with its own cache

OpenVINO's reader of ONNX takes an Attention apart into single steps, and takes as many key heads as query heads for
granted (seen in 2026.4). So it is told here what the operator is.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from nbl_export.batch import TOKENS
from nbl_export.errors import BuildError, InputError, first_line
from nbl_export.export.torch import trace
from nbl_export.files import TEMPORARY, publish
from nbl_export.graph.cache import KVPair, kv_layers, kv_pairs
from nbl_export.graph.io import load_graph, save_beside, save_graph
from nbl_export.graph.operators import int_attribute
from nbl_export.linearize.plan import Plan
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.folder import save_tokenizer
from nbl_export.packages import missing
from nbl_export.progress import Listener
from nbl_export.rewrite.replace import rewrite_file
from nbl_export.runtime.clients import (
    BEAMS,
    EXACT,
    FILE,
    KV_LAYERS,
    TOKENIZERS,
    TOKENIZERS_PACKAGE,
    last_line,
    require_openvino,
)

# The attribute of Attention for query heads that are not an axis of their own. Ours are one, but rotary embeddings hide
# its size from OpenVINO.
_HEADS = "q_num_heads"


def write_openvino(
    folder: Path, model: torch.nn.Module, plan: Plan, tokenizer: Any, dtype: str, listener: Listener
) -> list[Path]:
    """Write ``model`` with ``plan`` into ``folder``, its weights in ``float32`` or ``float16``; returns the files.

    The file that loads it is written last. Tokenizers in OpenVINO's form are written where openvino-tokenizers is
    installed. Raises the errors of an export and of a rewrite, and :class:`BuildError` for a graph that OpenVINO does
    not read.
    """
    ov = require_openvino()
    check_held(model)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / FILE
    target.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=".graph.", suffix=TEMPORARY, dir=folder) as temporary:
        path, new = _graph(Path(temporary), model, plan, listener), Path(temporary) / FILE
        with listener.task("Writing OpenVINO's file", 1, "file") as task:
            graph = load_graph(path)
            found = _read(ov, path, type(model).__name__)
            _keep_cache(found, kv_pairs(graph))
            found.set_rt_info(",".join(map(str, kv_layers(graph))), list(KV_LAYERS))
            ov.save_model(found, new, compress_to_fp16=dtype == "float16")
            del found, graph  # which have the files open
            task.advance(1)
        if plan.chosen:
            how = " ".join(f"{name}={value}" for name, value in EXACT.items())
            listener.note(
                "OpenVINO's defaults, a cache of 8 bits and products in half precision, give other tokens than those "
                f"that were proven; for these, load it with {how}."
            )
        written = [*save_tokenizer(tokenizer, folder), *_save_tokenizers(ov, tokenizer, folder, listener)]
        own: Any = model
        for config, name in ((own.config, "config.json"), (own.generation_config, "generation_config.json")):
            if config is not None:
                config.save_pretrained(folder)
                written.append(folder / name)
        for done in (new.with_suffix(".bin"), new):
            publish(done, folder / done.name)
            written.append(folder / done.name)
    return written


def check_held(model: torch.nn.Module) -> None:
    """Raise :class:`InputError` for a model whose layers keep something else than keys and values."""
    if any(block.states for block in dummy_run(model).cache):
        raise InputError(
            f"{type(model).__name__} keeps states of another kind than keys and values: --to openvino takes models "
            "that keep keys and values alone."
        )


def _graph(scratch: Path, model: torch.nn.Module, plan: Plan, listener: Listener) -> Path:
    """The graph of the model with the plan, whose Attentions say how many heads they have."""
    exported, told = scratch / "exported" / "model.onnx", scratch / "model.onnx"
    exported.parent.mkdir()
    save_graph(trace(model, listener=listener), exported)
    if plan.chosen:
        rewritten = scratch / "rewritten.onnx"
        rewrite_file(exported, plan, rewritten, listener, save_beside)
        exported = rewritten
    graph = load_graph(exported)
    tokens = next(value for value in graph.graph.inputs if value.name == TOKENS)
    pasts = {value for pair in kv_pairs(graph) for value in pair.past}
    for node in graph.graph:
        first = node.inputs[0] if node.inputs else None
        if node.op_type == "Attention":
            assert first is not None and first.shape is not None
            node.attributes[_HEADS] = ir.AttrInt64(_HEADS, int(first.shape[1]))  # type: ignore[arg-type]
        # The number of rows is that of the tokens, too, and paged attention has no cache to be asked.
        if node.op_type == "Shape" and first in pasts and int_attribute(node, "end") == 1:
            node.replace_input_with(0, tokens)
    save_beside(graph, told)
    return told


def _read(ov: Any, graph: Path, name: str) -> Any:
    """The graph as OpenVINO's."""
    from openvino.frontend.onnx import ConversionExtension

    core = ov.Core()
    core.add_extension(ConversionExtension("Attention", _attention))
    try:
        return core.read_model(graph)
    except Exception as error:  # of any kind, in C++
        raise BuildError(
            f"OpenVINO does not read the graph of {name} ({last_line(error)}): choose another form."
        ) from error


def _attention(node: Any) -> Any:
    """An Attention (queries, keys, values [batch, heads, tokens, head_dim], mask) in operators of OpenVINO."""
    from openvino import opset13 as ops

    queries, keys, values, mask = (node.get_input(i) for i in range(4))
    groups = node.get_attribute(_HEADS) // keys.get_partial_shape()[1].get_length()
    if groups > 1:
        keys, values = (_repeated(ops, side, groups) for side in (keys, values))
    scale = node.get_attribute("scale", 0.0) or keys.get_partial_shape()[3].get_length() ** -0.5
    # OpenVINO has a kernel for this one, that keeps keys and values in place.
    found = ops.scaled_dot_product_attention(queries, keys, values, mask, ops.constant(scale, np.float32))
    return found.outputs()


def _repeated(ops: Any, side: Any, groups: int) -> Any:
    """Keys or values, each head of which is there ``groups`` times."""
    heads, size = (side.get_partial_shape()[axis].get_length() for axis in (1, 3))
    apart = ops.unsqueeze(side, ops.constant(2, np.int64))
    several = ops.broadcast(
        apart, ops.constant([1, 1, groups, 1, 1], np.int64), broadcast_spec="BIDIRECTIONAL"
    )
    return ops.reshape(several, ops.constant([0, heads * groups, -1, size], np.int64), True).output(0)


def _keep_cache(model: Any, pairs: Sequence[KVPair]) -> None:
    """Make states of the inputs and outputs of the cache; ``beam_idx`` [batch] says which row each row goes on."""
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = ops.parameter([-1], np.int32, name=BEAMS)
    beams.output(0).get_tensor().add_names({BEAMS})
    model.add_parameters([beams])
    axis = ops.constant(0, np.int64)
    batch = ops.gather(ops.shape_of(model.input(TOKENS), "i64"), ops.constant([0], np.int64), axis)
    begun, states = {}, {}
    for pair in pairs:
        for side, (past, present) in enumerate(zip(pair.past, pair.present, strict=True)):
            own = model.input(past.name)
            readers = own.get_target_inputs()
            picked = ops.gather(own.node, beams, axis)
            for reader in readers:
                reader.replace_source_output(picked.output(0))
            states[own.any_name] = model.output(present.name).any_name
            heads, size = pair.geometry(side)
            begun[f"{past.name}{present.name}"] = ops.broadcast(
                ops.constant(0, np.float32), ops.concat([batch, ops.constant([heads, 0, size], np.int64)], 0)
            )
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, states)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            # Without a beginning the first `beam_idx` would pick rows of nothing.
            node.set_arguments([begun[node.get_variable_id()]])
    model.validate_nodes_and_infer_types()


def _save_tokenizers(ov: Any, tokenizer: Any, folder: Path, listener: Listener) -> Iterator[Path]:
    """The tokenizer and the detokenizer as files of OpenVINO, where openvino-tokenizers is installed and knows them."""
    try:
        from openvino_tokenizers import convert_tokenizer
    except ImportError:
        listener.note(f"No tokenizer of OpenVINO is written: {missing(TOKENIZERS_PACKAGE, 'It')}")
        return
    padded = copy.deepcopy(tokenizer)
    padded.padding_side = "left"  # rows end together, as the model reads them
    try:
        made = convert_tokenizer(padded, with_detokenizer=True)
    except Exception as error:  # of any kind, for a tokenizer that it does not know
        listener.note(f"No tokenizer of OpenVINO is written, give it token ids: {first_line(error)[:300]}")
        return
    for one, name in zip(made, TOKENIZERS, strict=True):
        ov.save_model(one, folder / name)
        yield from (folder / name, (folder / name).with_suffix(".bin"))
