"""A repository that Triton serves: each graph a model of it, whose cache Triton keeps from request to request.

models/linearized/config.pbtxt      inputs and outputs, and which of them are carried on (implicit state)
models/linearized/1/model.onnx      the graph, with its data beside it
models/base/ …                      the unmodified graph, where it is wanted
models/linearized_tensorrt/         the engine as 1/model.plan, where Triton's backend can take the one that was built

The requests of a sequence are one row: the prompt first, then what comes after it; attention_mask is over all tokens so
far. The first cache has no tokens. Schema: Triton's model_config.proto; tests/clients/test_triton.py holds to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from nbl_export.engine.manifest import load_manifest, manifest_path
from nbl_export.errors import InputError
from nbl_export.files import write_text
from nbl_export.graph.cache import is_static, kv_pairs
from nbl_export.graph.io import load_graph
from nbl_export.graph.states import state_pairs

CONFIG, ENGINE = "config.pbtxt", "linearized_tensorrt"
_ROWS = 8  # of an encoder, whose requests Triton puts together
_TYPES = {
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.BFLOAT16: "TYPE_BF16",
    ir.DataType.INT64: "TYPE_INT64",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.BOOL: "TYPE_BOOL",
}


def triton_names(graph: str) -> tuple[str, str]:
    """The path of a ``graph`` in the folder, and the name of its data file."""
    return f"models/{graph}/1/model.onnx", "model.onnx.data"


def write_configs(graphs: Sequence[Path]) -> None:
    """Write the configuration of each graph of a repository."""
    for path in graphs:
        write_text(path.parents[1] / CONFIG, triton_config(load_graph(path)))


def serve_engine(folder: Path, graph: Path, engine: Path) -> str:
    """Move the ``engine`` of ``graph`` and its manifest into the repository in ``folder``; returns why not, or "".

    Triton's backend is TensorRT, not TensorRT for RTX.
    """
    manifest = load_manifest(engine)
    if manifest.library != "tensorrt":
        return f"is of {manifest.library}, and Triton's backend takes those of tensorrt: build it with --trt tensorrt"
    target = folder / "models" / ENGINE / "1" / "model.plan"
    target.parent.mkdir(parents=True)
    engine.rename(target)
    manifest_path(engine).rename(manifest_path(target))
    write_text(target.parents[1] / CONFIG, engine_config(load_graph(graph), len(manifest.profiles)))
    return ""


def check_cache(model: ir.Model) -> None:
    """Raise :class:`InputError` for a cache that Triton cannot begin."""
    if is_static(model):
        raise InputError(
            "Triton begins a cache without tokens, and this graph's has a fixed length: export with --kv-cache concat."
        )


def engine_config(model: ir.Model, profiles: int) -> str:
    """The ``config.pbtxt`` of the graph's engine, which has that many profiles: Triton takes the one that fits."""
    numbers = ", ".join(f'"{number}"' for number in range(profiles))
    group = f"instance_group {{ kind: KIND_GPU count: 1 profile: [{numbers}] }}\n"
    return triton_config(model, "tensorrt") + group


def triton_config(model: ir.Model, backend: str = "onnxruntime") -> str:
    """The ``config.pbtxt`` of a graph that passes :func:`check_cache`, for a ``backend``."""
    carried = tuple(_carried(model))
    own = {value.name for pair in carried for value in pair[:2]}
    rows = 1 if carried else _ROWS
    lines = [f'backend: "{backend}"', f"max_batch_size: {rows}"]
    optional = model.graph.initializers  # an input with a value of its own
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        lines += [
            f'{kind} {{ name: "{value.name}" {_tensor(value, _open(value))} }}'
            for value in values
            if value.name not in own and value.name not in optional
        ]
    if not carried:
        lines += ["dynamic_batching { }"]
    else:
        lines += ["sequence_batching {", "  direct { }"]
        for past, present, beginning in carried:
            first = f'initial_state {{ name: "empty" {_tensor(past, beginning)} zero_data: true }}'
            names = f'input_name: "{past.name}" output_name: "{present.name}"'
            lines.append(f"  state {{ {names} {_tensor(past, _open(past))} {first} }}")
        lines += ["}"]
    return "\n".join(lines) + "\n"


def _carried(model: ir.Model) -> Iterator[tuple[ir.Value, ir.Value, tuple[int, ...]]]:
    """What goes from a request to the next: input, output, and the shape of the first without its batch."""
    for pair in kv_pairs(model):
        for side, (past, present) in enumerate(zip(pair.past, pair.present, strict=True)):
            heads, size = pair.geometry(side)
            yield past, present, (heads, 0, size)
    for state in state_pairs(model):
        yield state.past, state.present, state.shape


def _open(value: ir.Value) -> tuple[int, ...]:
    """The shape without its batch, -1 for what is open."""
    return tuple(d if isinstance(d, int) else -1 for d in (value.shape or ())[1:])


def _tensor(value: ir.Value, dims: Sequence[int]) -> str:
    if value.dtype not in _TYPES:
        raise InputError(f"Triton has no type for {value.name} ({value.dtype}).")
    return f"data_type: {_TYPES[value.dtype]} dims: [{', '.join(map(str, dims))}]"
