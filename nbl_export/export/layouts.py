"""Lay a package out for its reader: onnxruntime and its kin, transformers.js, or Triton.

folder  model.onnx and model.onnx.data; base.onnx is the unmodified graph, where it is wanted.

web     onnx/model.onnx, onnx/model.onnx_data: fp32; model_fp16, model_int8 and model_q4 are the others. Heads of a
        fixed size in the inputs of the cache; config.json with ``transformers.js_config``: the precision, and that
        weights lie apart; tokenizer_config.json with the chat template in it, and padding on the left of decoders.

triton  models/linearized/config.pbtxt (inputs and outputs, and which of them are carried on: implicit state) and
        models/linearized/1/model.onnx; models/linearized_tensorrt/1/model.plan where Triton's backend can take the
        engine that was built. The requests of a sequence are one row: the prompt first, then what comes after it;
        attention_mask is over all tokens so far. Schema: Triton's model_config.proto; tests/clients/test_triton.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from nbl_export.engine.manifest import load_manifest, manifest_path
from nbl_export.errors import InputError
from nbl_export.files import read_json, write_json, write_text
from nbl_export.graph.cache import is_static, kv_pairs, state_pairs
from nbl_export.graph.io import load_graph
from nbl_export.workspace import BASE, LINEARIZED


@dataclass(frozen=True)
class Layout:
    """``names`` are the path of the linearized graph, or of the base, in a precision, and the name of its data file.

    ``change`` is done to each graph before it is written, or refuses it; ``finish`` is done to the folder: its graphs,
    their precision, whether they generate. ``genai``: onnxruntime-genai finds the graph beside its configuration.
    ``engine`` is done with the graph and its engine: where the reader wants it, or why that cannot be.
    """

    names: Callable[[str, str], tuple[str, str]]
    change: Callable[[ir.Model], None] = lambda model: None
    finish: Callable[[Path, Sequence[Path], str, bool], None] = lambda *asked: None
    genai: bool = False
    engine: Callable[[Path, Path, Path], str] = lambda *asked: ""


_NAMES = {LINEARIZED: "model", BASE: "base"}  # ``model_file_name`` of transformers.js

# transformers.js ----------------------------------------------------------------------------------

# Precision → what transformers.js calls it, and how the name of its graph ends.
_CALLED = {"fp32": ("fp32", ""), "fp16": ("fp16", "_fp16"), "int8": ("int8", "_int8"), "int4": ("q4", "_q4")}
_AGAIN = "run `nbl-export export` again"


def _web_names(graph: str, precision: str) -> tuple[str, str]:
    if precision not in _CALLED:
        raise InputError(
            f"transformers.js runs no graph in {precision}: {', '.join(_CALLED)} are what it takes."
        )
    name = f"{_NAMES[graph]}{_CALLED[precision][1]}.onnx"
    return f"onnx/{name}", f"{name}_data"


def _size_cache(model: ir.Model) -> None:
    """Say how large a head of each cache input is: transformers.js makes the first, empty cache by that, in place."""
    for pair in kv_pairs(model):
        for side, values in enumerate(zip(pair.past, pair.present, strict=True)):
            heads, size = pair.geometry(side)
            for value in values:
                if value.shape is not None:
                    value.shape = ir.Shape([value.shape[0], heads, value.shape[2], size])


def _finish_web(folder: Path, _graphs: Sequence[Path], precision: str, generates: bool) -> None:
    """Say in the configurations of ``folder`` what transformers.js reads there; what others read stays."""
    called, suffix = _CALLED[precision]
    path = folder / "config.json"
    told: dict[str, object] = {
        "dtype": called,
        "use_external_data_format": {f"{name}{suffix}.onnx": 1 for name in _NAMES.values()},
    }
    if precision == "fp16":
        told["kv_cache_dtype"] = {"fp16": "float16"}
    config = read_json(path, "The configuration", _AGAIN)
    write_json(path, {**config, "transformers.js_config": told})
    tokenizer, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if tokenizer.is_file():
        settings = dict(read_json(tokenizer, "The tokenizer's configuration", _AGAIN))
        if generates:
            settings["padding_side"] = "left"
        if template.is_file():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        write_json(tokenizer, settings)


# Triton -------------------------------------------------------------------------------------------

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


def _check_cache(model: ir.Model) -> None:
    if is_static(model):
        raise InputError(
            "Triton begins a cache without tokens, and this graph's has a fixed length: export with --kv-cache concat."
        )


def _finish_triton(_folder: Path, graphs: Sequence[Path], _precision: str, _generates: bool) -> None:
    for path in graphs:
        write_text(path.parents[1] / CONFIG, triton_config(load_graph(path)))


def _serve_engine(folder: Path, graph: Path, engine: Path) -> str:
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
    write_text(target.parents[1] / CONFIG, triton_config(load_graph(graph), len(manifest.profiles)))
    return ""


def triton_config(model: ir.Model, profiles: int = 0) -> str:
    """The ``config.pbtxt`` of a graph, or of its engine, which has that many ``profiles``: Triton takes the one that
    fits.
    """
    carried = tuple(_carried(model))
    own = {value.name for pair in carried for value in pair[:2]}
    lines = [
        f'backend: "{"tensorrt" if profiles else "onnxruntime"}"',
        f"max_batch_size: {1 if carried else _ROWS}",
    ]
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        lines += [
            f'{kind} {{ name: "{value.name}" {_tensor(value, _open(value))} }}'
            for value in values
            if value.name not in own and value.name not in model.graph.initializers  # which are optional
        ]
    lines += ["sequence_batching {", "  direct { }"] if carried else ["dynamic_batching { }"]
    for past, present, beginning in carried:
        first = f'initial_state {{ name: "empty" {_tensor(past, beginning)} zero_data: true }}'
        names = f'input_name: "{past.name}" output_name: "{present.name}"'
        lines.append(f"  state {{ {names} {_tensor(past, _open(past))} {first} }}")
    lines += ["}"] if carried else []
    if profiles:
        numbers = ", ".join(f'"{number}"' for number in range(profiles))
        lines.append(f"instance_group {{ kind: KIND_GPU count: 1 profile: [{numbers}] }}")
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


LAYOUTS = {
    "folder": Layout(lambda graph, _: (f"{_NAMES[graph]}.onnx", f"{_NAMES[graph]}.onnx.data"), genai=True),
    "web": Layout(_web_names, _size_cache, _finish_web),
    "triton": Layout(
        lambda graph, _: (f"models/{graph}/1/model.onnx", "model.onnx.data"),
        _check_cache,
        _finish_triton,
        engine=_serve_engine,
    ),
}
