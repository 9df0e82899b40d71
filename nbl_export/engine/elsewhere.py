"""Write what trtexec and Polygraphy need to build what we build.

model.fixed.onnx            beside model.onnx and over the same data: a static cache has its length there, for which
                            TensorRT asks and which the graph leaves open
engine/model.trtexec.sh     trtexec with the shapes of both profiles
engine/model_rows.py        rows for Polygraphy's --data-loader-script: a prefill, and a step after it

The same for baseline/model.onnx. A cache that grows needs no other graph.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from nbl_export.batch import MASK, MAX, POSITIONS, TOKENS, WRITE_INDICES
from nbl_export.engine.manifest import DECODE, Manifest, Profile
from nbl_export.files import TEMPORARY, atomic_path, write_text
from nbl_export.graph.cache import is_static
from nbl_export.graph.io import load_graph

_LOADER = '''"""Rows for `polygraphy run {graph} --data-loader-script {name}`: a prefill, and a step after it."""

import numpy as np

# Of each round: the tokens before it, and each input's dtype and shape.
ROUNDS = {rounds}


def _value(name, dtype, shape, past):
    if name == "{positions}":
        return np.broadcast_to(past + np.arange(shape[1]), shape).astype(dtype)
    fill = {{"{tokens}": 1, "{mask}": 1, "{indices}": past}}.get(name, 0)
    return np.full(shape, fill, dtype)


def load_data():
    for past, inputs in ROUNDS:
        yield {{name: _value(name, dtype, shape, past) for name, (dtype, shape) in inputs.items()}}
'''
_SCRIPT = """#!/bin/sh
# The engine {name} by trtexec: profile 0 is of the prefill, 1 of the decode.
cd "$(dirname "$0")" || exit
exec {command}
"""


def fixed_path(graph: Path) -> Path:
    """Where the graph with the length of its cache lies."""
    return graph.with_suffix(f".fixed{graph.suffix}")


def write_for_others(graph: Path, engine: Path, manifest: Manifest) -> list[Path]:
    """Write what other builders need for the ``engine`` of ``graph`` with its ``manifest``; returns the files.

    numpy has no bfloat16, so that there are no rows for such a graph.
    """
    told, files = graph, list[Path]()
    if manifest.kv_cache == "static":
        told = fixed_path(graph)
        with atomic_path(told) as temporary:
            write_fixed(graph, temporary, manifest.limits.max_context)
        files.append(told)
    # From the folder of the engine, so that the output folder can be moved.
    above = (Path("..") / told.relative_to(engine.parents[1])).as_posix()
    files.append(engine.with_suffix(".trtexec.sh"))
    write_text(files[-1], _trtexec(above, engine.stem, manifest.profiles))
    inputs = {str(value.name): value.dtype for value in load_graph(graph).graph.inputs}
    if ir.DataType.BFLOAT16 not in inputs.values():
        files.append(engine.with_name(f"{engine.stem}_rows.py"))
        rounds = [_round(profile, manifest.limits.max_context, inputs) for profile in manifest.profiles]
        names = {"positions": POSITIONS, "tokens": TOKENS, "mask": MASK, "indices": WRITE_INDICES}
        told_rounds = json.dumps(rounds, indent=1)
        write_text(files[-1], _LOADER.format(graph=above, name=files[-1].name, rounds=told_rounds, **names))
    return files


def write_fixed(graph: Path, target: Path, length: int) -> None:
    """The graph whose dimensions called :data:`MAX` are ``length``; its weights stay where they are."""
    proto = onnx.load(graph, load_external_data=False)
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == MAX:
                dim.dim_value = length
    onnx.save(proto, str(target), format="protobuf")


@contextmanager
def parsable(path: Path, length: int) -> Iterator[Path]:
    """The file of the graph at ``path`` that TensorRT parses: a static cache has ``length`` positions there."""
    if not is_static(load_graph(path)):
        yield path
        return

    handle, name = tempfile.mkstemp(prefix=".fixed.", suffix=TEMPORARY, dir=path.parent)  # beside its weights
    os.close(handle)
    try:
        write_fixed(path, Path(name), length)
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _trtexec(graph: str, name: str, profiles: Sequence[Profile]) -> str:
    lines = [f"--onnx={graph}", "--stronglyTyped", f"--saveEngine={name}.trtexec.engine"]
    for number, profile in enumerate(profiles):
        lines.append(f"--profile={number}")
        for which, place in (("min", 0), ("opt", 1), ("max", 2)):
            shapes = ",".join(f"{n}:{'x'.join(map(str, at[place]))}" for n, at in profile.shapes.items())
            lines.append(f"--{which}Shapes={shapes}")
    command = " \\\n  ".join(["trtexec", *map(shlex.quote, lines), '"$@"'])
    return _SCRIPT.format(name=name, command=command)


def _round(profile: Profile, context: int, dtypes: Mapping[str, ir.DataType | None]) -> tuple[int, Any]:
    """The tokens before those of a profile, and each input's dtype and best shape."""
    shapes = {name: best for name, (_, best, _) in profile.shapes.items()}
    before = context // 2 if profile.name == DECODE else 0
    return shapes[MASK][1] - shapes[TOKENS][1] if MASK in shapes else before, {
        name: ((dtypes[name] or ir.DataType.FLOAT).numpy().name, best) for name, best in shapes.items()
    }
