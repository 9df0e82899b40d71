"""Write a Llama-shaped ONNX decoder of any size with random weights, as onnxruntime-genai's builder would.

    scripts/synthetic_llama.py FOLDER [--layers 32] [--dtype fp16] [--sparse] [--split GB]

The defaults have the shape of Llama 3.1 8B: 16 GB of fp16 weights in external data. The weights are streamed from one
block of a few dozen MiB of seeded random normal values, repeated at a different offset for each tensor, so writing
needs little memory, and no two layers are equal. Names, operators and types are those of the builder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

Dtype = Literal["fp16", "fp32"]

_NUMPY: dict[Dtype, type[np.float16] | type[np.float32]] = {"fp16": np.float16, "fp32": np.float32}
_ONNX = {"fp16": TensorProto.FLOAT16, "fp32": TensorProto.FLOAT}
# Prime, so that no row of a weight ever lines up with another.
_BLOCK_ELEMENTS = 16_777_213
_EPSILON = 1e-5


@dataclass(frozen=True)
class _Weight:
    """An initializer to be written: random normal values ``mean + std * z``, or the given ``values``."""

    name: str
    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0
    values: npt.NDArray[Any] | None = None


@dataclass
class _Decoder:
    """The graph under construction."""

    dtype: Dtype
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    infos: list[onnx.ValueInfoProto] = field(default_factory=list)
    weights: list[_Weight] = field(default_factory=list)

    def weight(self, name: str, rows: int, columns: int, fan_in: int) -> str:
        self.weights.append(_Weight(name, (rows, columns), std=fan_in**-0.5))
        return name

    def norm(self, name: str, width: int) -> str:
        self.weights.append(_Weight(name, (width,), std=0.05, mean=1.0))
        return name

    def node(
        self,
        operator: str,
        name: str,
        inputs: list[str],
        shape: list[int | str],
        outputs: list[str] | None = None,
        domain: str = "",
        kind: int | None = None,
        **attributes: Any,
    ) -> str:
        """Add a node; returns its first output, whose type and ``shape`` are recorded."""
        outputs = outputs or [f"{name}/output_0"]
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=name, domain=domain, **attributes))
        kind = _ONNX[self.dtype] if kind is None else kind
        for output in outputs:
            if output and "/" in output:
                self.infos.append(helper.make_tensor_value_info(output, kind, shape))
        return outputs[0]

    def integer(self, value: int, *, listed: bool) -> str:
        text = f"[{value}]" if listed else str(value)
        name, dims = f"/model/constants/INT64/{text}", [1] if listed else []
        tensor = helper.make_tensor(name, TensorProto.INT64, dims, [value])
        node = f"/model/constant_nodes/INT64/{text}"
        return self.node("Constant", node, [], list(dims), [name], kind=TensorProto.INT64, value=tensor)


def write_synthetic_llama(
    folder: Path,
    hidden: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int = 8,
    intermediate: int = 14336,
    vocab: int = 128256,
    dtype: Dtype = "fp16",
    positions: int = 8192,
    rope_theta: float = 500_000.0,
    sparse: bool = False,
    split_bytes: int | None = None,
    seed: int = 0,
) -> Path:
    """Write ``folder/model.onnx`` and its data; returns its path.

    All weights are in ``model.onnx.data`` or, with ``split_bytes``, in files of at most that many bytes (a larger
    tensor has its own file). ``sparse`` leaves holes instead of random values: they read as zeros and use no space.
    """
    head = hidden // heads
    decoder = _Decoder(dtype)
    _add_nodes(decoder, hidden, layers, heads, kv_heads, intermediate, vocab)
    _add_rotary(decoder, head, positions, rope_theta)
    folder.mkdir(parents=True, exist_ok=True)
    initializers = _write_weights(decoder, folder, sparse, split_bytes, seed)
    path = folder / "model.onnx"
    path.write_bytes(_model(decoder, initializers, layers, kv_heads, vocab).SerializeToString())
    return path


def _add_nodes(
    decoder: _Decoder, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int
) -> None:
    head, packed = hidden // heads, hidden + 2 * kv_heads * (hidden // heads)
    wide: list[int | str] = ["batch_size", "sequence_length", hidden]
    lengths = _add_lengths(decoder)
    table = decoder.weight("model.embed_tokens.weight", vocab, hidden, fan_in=hidden)
    skip = decoder.node("Gather", "/model/embed_tokens/Gather", [table, "input_ids"], wide)
    # The output of the block before, added to the residual by the norm that follows it.
    block = ""
    for i in range(layers):
        x, skip = _add_norm(decoder, f"/model/layers.{i}/input_layernorm", skip, block, wide)
        name = f"/model/layers.{i}/attn"
        past = [f"past_key_values.{i}.{part}" for part in ("key", "value")]
        qkv = _add_matmul(decoder, f"{name}/qkv_proj", x, hidden, packed)
        attention = decoder.node(
            "GroupQueryAttention",
            f"{name}/GroupQueryAttention",
            [qkv, "", "", *past, *lengths, "cos_cache", "sin_cache", "", "", ""],
            wide,
            [f"{name}/GroupQueryAttention/output_0", f"present.{i}.key", f"present.{i}.value"],
            "com.microsoft",
            num_heads=heads,
            kv_num_heads=kv_heads,
            scale=head**-0.5,
            local_window_size=-1,
            softcap=0.0,
            do_rotary=1,
            rotary_interleaved=0,
        )
        block = _add_matmul(decoder, f"{name}/o_proj", attention, hidden, hidden)
        x, skip = _add_norm(decoder, f"/model/layers.{i}/post_attention_layernorm", skip, block, wide)
        block = _add_mlp(decoder, f"/model/layers.{i}/mlp", x, hidden, intermediate)
    last = f"/model/layers.{layers}/final_norm_layernorm"
    x, _ = _add_norm(decoder, last, skip, block, wide, final=True)
    head_weight = decoder.weight("lm_head.MatMul.weight", hidden, vocab, fan_in=hidden)
    decoder.node("MatMul", "/lm_head/MatMul", [x, head_weight], [], ["logits"])


def _add_lengths(decoder: _Decoder) -> list[str]:
    """``seqlens_k`` and ``total_sequence_length`` of GroupQueryAttention, from the attention mask."""
    name, batch = "/model/attn_mask_reformat/attn_mask_subgraph", ["batch_size"]
    int32, int64 = TensorProto.INT32, TensorProto.INT64

    def node(operator: str, inputs: list[str], shape: list[Any], kind: int, at: str, **given: Any) -> str:
        return decoder.node(operator, f"{name}/{at}", inputs, shape, kind=kind, **given)

    one = decoder.integer(1, listed=True)
    ones = node("ReduceSum", ["attention_mask", one], batch, int64, "ReduceSum", keepdims=0)
    less = node("Sub", [ones, one], batch, int64, "Sub")
    last = node("Cast", [less], batch, int32, "Sub/Cast", to=int32)
    shape = node("Shape", ["attention_mask"], [2], int64, "Shape")
    index = decoder.integer(1, listed=False)
    total = node("Gather", [shape, index], [], int64, "Gather", axis=0)
    return [last, node("Cast", [total], [], int32, "Gather/Cast", to=int32)]


def _add_norm(
    decoder: _Decoder, name: str, skip: str, block: str, shape: list[int | str], final: bool = False
) -> tuple[str, str]:
    """RMSNorm of ``skip + block``; returns it and the sum, the new residual."""
    weight = decoder.norm(name.strip("/").replace("/", ".") + ".weight", int(shape[-1]))
    normed = f"{name}/output_0"
    if not block:
        given: dict[str, Any] = {"epsilon": _EPSILON, "axis": -1, "stash_type": 1}
        operator, inputs = "SimplifiedLayerNormalization", [skip, weight]
        return decoder.node(operator, f"{name}/LayerNorm", inputs, shape, [normed], **given), skip
    outputs = [normed] if final else [normed, "", "", f"{name}/output_3"]
    inputs = [skip, block, weight]
    operator = "SkipSimplifiedLayerNormalization"
    decoder.node(operator, f"{name}/SkipLayerNorm", inputs, shape, outputs, "com.microsoft", epsilon=_EPSILON)
    return normed, outputs[-1]


def _add_matmul(decoder: _Decoder, name: str, x: str, rows: int, columns: int) -> str:
    weight = decoder.weight(name.strip("/").replace("/", ".") + ".MatMul.weight", rows, columns, fan_in=rows)
    return decoder.node("MatMul", f"{name}/MatMul", [x, weight], ["batch_size", "sequence_length", columns])


def _add_mlp(decoder: _Decoder, name: str, x: str, hidden: int, intermediate: int) -> str:
    shape: list[int | str] = ["batch_size", "sequence_length", intermediate]
    gate = _add_matmul(decoder, f"{name}/gate_proj", x, hidden, intermediate)
    up = _add_matmul(decoder, f"{name}/up_proj", x, hidden, intermediate)
    sigmoid = decoder.node("Sigmoid", f"{name}/act_fn/Sigmoid", [gate], shape)
    silu = decoder.node("Mul", f"{name}/act_fn/Mul", [gate, sigmoid], shape)
    gated = decoder.node("Mul", f"{name}/Mul", [silu, up], shape)
    return _add_matmul(decoder, f"{name}/down_proj", gated, intermediate, hidden)


def _add_rotary(decoder: _Decoder, head: int, positions: int, theta: float) -> None:
    frequencies = theta ** -(np.arange(0, head, 2, dtype=np.float64) / head)
    angles = np.outer(np.arange(positions), frequencies)
    for name, values in (("cos_cache", np.cos(angles)), ("sin_cache", np.sin(angles))):
        decoder.weights.append(_Weight(name, values.shape, values=values.astype(_NUMPY[decoder.dtype])))


def _model(
    decoder: _Decoder, initializers: list[onnx.TensorProto], layers: int, kv_heads: int, vocab: int
) -> onnx.ModelProto:
    def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    kind = _ONNX[decoder.dtype]
    parts = [f"{i}.{part}" for part in ("key", "value") for i in range(layers)]
    inputs = [
        value("input_ids", TensorProto.INT64, "batch_size", "sequence_length"),
        value("attention_mask", TensorProto.INT64, "batch_size", "total_sequence_length"),
    ]
    length, width = "past_sequence_length", "kv_cache_dim"
    inputs += [value(f"past_key_values.{p}", kind, "batch_size", kv_heads, length, width) for p in parts]
    outputs = [value("logits", kind, "batch_size", "sequence_length", vocab)]
    length = "total_sequence_length"
    outputs += [value(f"present.{p}", kind, "batch_size", kv_heads, length, width) for p in parts]
    infos = [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in initializers]
    graph = helper.make_graph(
        decoder.nodes, "main_graph", inputs, outputs, initializers, value_info=infos + decoder.infos
    )
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="synthetic-llama")


# weights ------------------------------------------------------------------------------------------


def _write_weights(
    decoder: _Decoder, folder: Path, sparse: bool, split_bytes: int | None, seed: int
) -> list[onnx.TensorProto]:
    normal = np.random.default_rng(seed).standard_normal(_BLOCK_ELEMENTS, dtype=np.float32)
    blocks: dict[tuple[float, float], npt.NDArray[Any]] = {}
    kind = _NUMPY[decoder.dtype]
    placed = _layout(decoder, split_bytes)
    for number, (weight, name, offset, length) in enumerate(placed):
        with (folder / name).open("wb" if offset == 0 else "r+b") as file:
            file.seek(offset)
            if weight.values is not None:
                file.write(weight.values.tobytes())
            elif sparse:
                file.truncate(offset + length)
            else:
                key = (weight.std, weight.mean)
                if key not in blocks:
                    blocks[key] = (weight.mean + weight.std * normal).astype(kind)
                for piece in _repeated(blocks[key], number * 7_368_787, int(np.prod(weight.shape))):
                    file.write(piece.data)
    return [_external(w, _ONNX[decoder.dtype], name, at, size) for w, name, at, size in placed]


def _layout(decoder: _Decoder, split_bytes: int | None) -> list[tuple[_Weight, str, int, int]]:
    """File, offset and length of each weight, packed as by the builder."""
    placed, file, end = [], 0, 0
    for weight in decoder.weights:
        length = int(np.prod(weight.shape)) * _NUMPY[decoder.dtype]().itemsize
        if split_bytes is not None and end and end + length > split_bytes:
            file, end = file + 1, 0
        placed.append((weight, "model.onnx.data" + (f".{file}" if file else ""), end, length))
        end += length
    return placed


def _repeated(block: npt.NDArray[Any], shift: int, count: int) -> Iterator[npt.NDArray[Any]]:
    """``count`` values of the endlessly repeated ``block``, starting at offset ``shift``."""
    at = shift % len(block)
    while count:
        piece = block[at : at + count]
        yield piece
        count -= len(piece)
        at = 0


def _external(weight: _Weight, kind: int, name: str, offset: int, length: int) -> onnx.TensorProto:
    tensor = TensorProto(name=weight.name, data_type=kind, dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", name), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument("--sparse", action="store_true", help="zero weights that use no disk space")
    parser.add_argument("--split", type=float, metavar="GB", help="largest data file, in 10⁹ bytes")
    given = parser.parse_args()
    split = None if given.split is None else int(given.split * 1e9)
    print(
        write_synthetic_llama(
            given.folder, layers=given.layers, dtype=given.dtype, sparse=given.sparse, split_bytes=split
        )
    )


if __name__ == "__main__":
    main()
