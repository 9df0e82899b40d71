"""The random decoders as ONNX, written the way different exporters write them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.end_to_end.random_decoders import BLOCK, EPSILON, Choices, Weights

MICROSOFT = "com.microsoft"
Pair = tuple[str, str]


@dataclass(frozen=True)
class Written:
    """A decoder's graph, the names of past and present (key, value) of each layer, and of its tensors.

    ``tensors`` are by layer: what the attention reads, the stream before it, and what it writes, without the bias
    ``later``, where a norm behind it adds that.
    """

    proto: onnx.ModelProto
    past: tuple[Pair, ...]
    present: tuple[Pair, ...]
    tensors: list[tuple[str, str, str]]
    later: list[Any]


def written(c: Choices, weights: Weights) -> Written:
    return _Writer(c, weights).decoder()


def cache_names(c: Choices) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Names of past and present (key, value) of each layer; the arbitrary ones say nothing at all."""
    if c.cache == "none":
        return (), ()
    layers = range(c.layers - c.borrows)
    if c.cache == "usual":
        past = [(f"past_key_values.{i}.key", f"past_key_values.{i}.value") for i in layers]
        return tuple(past), tuple((f"present.{i}.key", f"present.{i}.value") for i in layers)
    if c.cache == "numbered":
        past = [(f"k_{i}_old", f"v_{i}_old") for i in layers]
        return tuple(past), tuple((f"k_{i}_new", f"v_{i}_new") for i in layers)
    rng = random.Random(c.seed)
    words = iter(rng.sample([a + b + c for a in "bdgklm" for b in "aeiou" for c in "nrstz"], 4 * c.layers))
    pairs = [((next(words), next(words)), (next(words), next(words))) for _ in layers]
    return tuple(p for p, _ in pairs), tuple(q for _, q in pairs)


class _Writer:
    def __init__(self, c: Choices, weights: Weights) -> None:
        self.c, self.weights = c, weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.past, self.present = cache_names(c)
        self.allowed = self.bias = self.total = ""  # once they are known
        self.tensors: list[tuple[str, str, str]] = []

    # parts ---------------------------------------------------------------------------------------

    def op(self, kind: str, *inputs: str, to: str | None = None, domain: str = "", **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        output = to or f"{name}_out"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def const(self, array: Any, dtype: Any = np.int64, name: str | None = None) -> str:
        array = np.asarray(array, dtype=dtype)
        name = name or f"const_{len(self.initializers)}"
        self.initializers.setdefault(name, numpy_helper.from_array(array.copy(order="C"), name))
        return name

    def number(self, value: float) -> str:
        return self.const(value, np.float32)

    def weight(self, name: str, turned: bool = False) -> str:
        if self.c.shared and name.partition(".")[2].split(".")[0] in ("q", "k", "v", "o"):
            name = f"0.{name.partition('.')[2]}"
        array = self.weights.arrays[name]
        return self.const(array.T if turned else array, np.float32, f"{name} turned" if turned else name)

    def cast(self, x: str, dtype: int) -> str:
        result = self.op("Cast", x)
        self.nodes[-1].attribute.append(helper.make_attribute("to", dtype))
        return result

    def reshape(self, x: str, *sizes: int) -> str:
        return self.op("Reshape", x, self.const(sizes))

    def unflatten(self, x: str, size: int) -> str:
        """[batch · sequence, size] as [batch, sequence, size]."""
        shape = self.op("Concat", self.op("Shape", "input_ids"), self.const([size]), axis=0)
        return self.op("Reshape", x, shape)

    def length(self, x: str, axis: int) -> str:
        return self.op("Gather", self.op("Shape", x), self.const(axis), axis=0)

    def linear(self, x: str, name: str, bias: str = "none") -> str:
        """x [batch, sequence, in] times a matrix; ``bias`` says how its bias is added, if at all."""
        kind, size = self.c.linear, self.weights.arrays[name].shape[1]
        vector = self.weight(f"{name}.bias") if bias not in ("none", "skip norm") else ""
        flat = kind.startswith("Gemm") or bias.endswith("Reshape")
        if flat:
            x = self.reshape(x, -1, self.weights.arrays[name].shape[0])
        inside = vector if bias == "inside" else ""
        y = self._product(x, name, kind, inside)
        if bias == "before Reshape":
            y = self.op("Add", vector, y)
        if flat:
            y = self.unflatten(y, size)
        return self.op("Add", y, vector) if bias in ("Add", "after Reshape") else y

    def _product(self, x: str, name: str, kind: str, inside: str) -> str:
        if kind == "MatMulNBits":
            return self._n_bits(x, name, inside)
        if kind == "Transpose":
            return self.op("MatMul", x, self.op("Transpose", self.weight(name, turned=True), perm=[1, 0]))
        arguments = [x, self.weight(name, turned=kind == "Gemm transposed"), *([inside] if inside else [])]
        if kind == "Gemm":
            return self.op("Gemm", *arguments)
        return (
            self.op("Gemm", *arguments, transB=1)
            if kind == "Gemm transposed"
            else self.op("MatMul", *arguments)
        )

    def _n_bits(self, x: str, name: str, bias: str) -> str:
        q = self.weights.blocks[name]
        if self.c.shared and name.partition(".")[2] in ("q", "k", "v", "o"):
            name = f"0.{name.partition('.')[2]}"
        packed = q.numbers[..., ::2] | q.numbers[..., 1::2] << 4
        arguments = [
            x,
            self.const(packed, np.uint8, f"{name} numbers"),
            self.const(q.scales.reshape(-1), np.float32, f"{name} scales"),
        ]
        zeros = ""
        if not self.c.symmetric:
            filled = np.pad(q.zeros, [(0, 0), (0, q.zeros.shape[1] % 2)])
            zeros = self.const((filled[:, ::2] | filled[:, 1::2] << 4).reshape(-1), np.uint8, f"{name} zeros")
        arguments += [zeros, "", bias] if bias else [zeros] if zeros else []
        n, k = len(q.scales), q.rows
        return self.op("MatMulNBits", *arguments, domain=MICROSOFT, K=k, N=n, bits=4, block_size=BLOCK)

    def norm(self, x: str, name: str) -> str:
        kind, scale = self.c.norm, self.weight(f"{name}.scale")
        if kind == "decomposed":
            square = self.op("Pow", x, self.number(2))
            if self.c.opset < 18:
                mean = self.op("ReduceMean", square, axes=[-1], keepdims=1)
            else:
                mean = self.op("ReduceMean", square, self.const([-1]), keepdims=1)
            root = self.op("Sqrt", self.op("Add", mean, self.number(EPSILON)))
            return self.op("Mul", scale, self.op("Mul", x, self.op("Reciprocal", root)))
        arguments = [x, scale, *([self.weight(f"{name}.bias")] if self.c.centered else [])]
        return self.op(kind, *arguments, axis=-1, epsilon=EPSILON)

    def skip_norm(self, h: str, y: str, name: str, bias: str = "") -> Pair:
        """Norm of h + y (+ bias), and that sum, from one node."""
        scale = self.weight(f"{name}.scale")
        centered = [self.weight(f"{name}.bias")] if self.c.centered else []
        kind = "SkipLayerNormalization" if centered else "SkipSimplifiedLayerNormalization"
        arguments = [h, y, scale, *centered, *([bias] if bias else [])]
        normed = self.op(kind, *arguments, domain=MICROSOFT, epsilon=EPSILON)
        self.nodes[-1].output.extend(["", "", f"{normed}_sum"])
        return normed, f"{normed}_sum"

    # the decoder ---------------------------------------------------------------------------------

    def decoder(self) -> Written:
        c = self.c
        h = self.op("Gather", self.weight("embed"), "input_ids", axis=0)
        h = self.op("Add", h, self.op("Gather", self.weight("positions"), self.position_ids(), axis=0))
        x = ""
        for i in range(c.layers):
            if c.block == "fused":
                x = x or self.norm(h, f"{i}.before")
                y = self.attention(i, x, h)
                later = self.weight(f"{i}.o.bias") if c.o_bias == "skip norm" else ""
                x, h = self.skip_norm(h, y, f"{i}.mlp before", later)
                following = "last" if i + 1 == c.layers else f"{i + 1}.before"
                x, h = self.skip_norm(h, self.mlp(i, x), following)
            else:
                h = self.block(i, h)
        x = x if c.block == "fused" else self.norm(h, "last")
        if c.tied:
            self.op("MatMul", x, self.op("Transpose", self.weight("embed"), perm=[1, 0]), to="logits")
        else:
            self.op("MatMul", x, self.weight("head"), to="logits")
        bias = [self.weights.arrays[f"{i}.o.bias"] if c.o_bias == "skip norm" else 0 for i in range(c.layers)]
        return Written(self.proto(), self.past, self.present, self.tensors, bias)

    def block(self, i: int, h: str) -> str:
        c = self.c
        x = h if c.block == "post" else self.norm(h, f"{i}.before")
        y = self.attention(i, x, h)
        if c.block.startswith("parallel"):
            m = self.mlp(i, x if c.block == "parallel" else self.norm(h, f"{i}.mlp before"))
            return self.op("Add", self.op("Add", y, m), h)
        y = self.norm(y, f"{i}.after") if c.block in ("post", "sandwich") else y
        h = self.op("Add", h, y)
        m = self.mlp(i, h if c.block == "post" else self.norm(h, f"{i}.mlp before"))
        m = self.norm(m, f"{i}.mlp after") if c.block in ("post", "sandwich") else m
        return self.op("Add", m, h)

    def mlp(self, i: int, x: str) -> str:
        return self.linear(self.op("Relu", self.linear(x, f"{i}.up")), f"{i}.down")

    def position_ids(self) -> str:
        if self.c.positions == "input":
            return "position_ids"
        start, stop = self.start_and_stop()
        return self.op("Range", start, stop, self.const(1))

    def start_and_stop(self) -> Pair:
        """The number of tokens before these, and with them."""
        sequence = self.length("input_ids", 1)
        if self.c.cache == "none":
            return self.const(0), sequence
        if self.c.length == "mask":
            total = self.length("attention_mask", 1)
            return self.op("Sub", total, sequence), total
        if self.c.length == "present":
            total = self.length(self.present[0][0], 2)
            return self.op("Sub", total, sequence), total
        start = self.length(self.past[0][0], 2)
        return start, self.op("Add", start, sequence)

    def masks(self) -> None:
        """Which key each token may see: boolean [batch, 1, sequence, total], and as a summand."""
        if self.allowed:
            return
        start, stop = self.start_and_stop()
        query = self.op("Unsqueeze", self.op("Range", start, stop, self.const(1)), self.const([1]))
        key = self.op("Unsqueeze", self.op("Range", self.const(0), stop, self.const(1)), self.const([0]))
        causal = self.op("LessOrEqual", key, query)
        real = self.op("Unsqueeze", self.cast("attention_mask", TensorProto.BOOL), self.const([1, 2]))
        lowest = -np.inf
        if not self.c.nan_guard:  # padding sees itself, or its softmax would be 0/0
            real = self.op("Or", real, self.op("Equal", key, query))
            lowest = -1e9
        self.allowed = self.op("And", causal, real)
        self.lowest = self.number(lowest)
        if self.c.attention == "MultiHeadAttention" or (
            self.c.attention == "decomposed" and self.c.mask == "Add"
        ):
            self.bias = self.op("Where", self.allowed, self.number(0), self.lowest)

    # attention -----------------------------------------------------------------------------------

    def attention(self, i: int, x: str, h: str) -> str:
        c = self.c
        query, key, value = self.projections(i, x)
        counts = {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}
        split = {
            name: self.reshape(flat, 0, 0, counts[name], c.head_size)
            for name, flat in zip("qkv", (query, key, value), strict=True)
        }
        if c.qk_norm:
            split |= {name: self.norm(split[name], f"{i}.{name} norm") for name in "qk"}
        if c.attention in ("MultiHeadAttention", "GroupQueryAttention"):
            flat = {"q": query, "k": key, "v": value}
            if c.qk_norm:
                flat |= {n: self.reshape(split[n], 0, 0, counts[n] * c.head_size) for n in "qk"}
            mixed = self.microsoft(i, flat["q"], flat["k"], flat["v"])
        else:
            four = {n: self.op("Transpose", v, perm=[0, 2, 1, 3]) for n, v in split.items()}
            if c.borrows and i == c.layers - 1:
                four |= {"k": self.keys, "v": self.values}
            elif c.attention != "Attention with past" and c.cache != "none":
                for side, name in enumerate("kv"):
                    four[name] = self.op(
                        "Concat", self.past[i][side], four[name], to=self.present[i][side], axis=2
                    )
            self.keys, self.values = four["k"], four["v"]
            self.masks()
            if c.attention == "decomposed":
                mixed = self.decomposed(four["q"], four["k"], four["v"])
            else:
                mixed = self.fused(i, four["q"], four["k"], four["v"])
            mixed = self.reshape(self.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, c.heads * c.head_size)
        y = self.linear(mixed, f"{i}.o", c.o_bias)
        self.tensors.append((x, h, y))
        return y

    def projections(self, i: int, x: str) -> tuple[str, str, str]:
        c = self.c
        names = [f"{i}.{n}" for n in "qkv"]
        bias = "none"
        if c.qkv_bias:
            bias = "inside" if c.linear.startswith("Gemm") else "Add"
        if c.packing == "separate" or c.quantized:
            query, key, value = (self.linear(x, name, bias) for name in names)
            return query, key, value
        arrays = dict(self.weights.arrays)
        packed = f"{0 if c.shared else i}.qkv"
        arrays[packed] = np.concatenate([arrays[n] for n in names], 1)
        if c.qkv_bias:
            arrays[f"{packed}.bias"] = np.concatenate([arrays[f"{n}.bias"] for n in names])
        self.weights = Weights(arrays, self.weights.blocks)
        whole = self.linear(x, packed, bias)
        sizes = [arrays[n].shape[1] for n in names]
        if c.packing == "Slice":
            ends = np.cumsum([0, *sizes])
            query, key, value = (
                self.op("Slice", whole, self.const([a]), self.const([b]), self.const([-1]))
                for a, b in itertools.pairwise(ends)
            )
            return query, key, value
        first = self.op("Split", whole, self.const(sizes), axis=-1)
        self.nodes[-1].output.extend([f"{first}_k", f"{first}_v"])
        return first, f"{first}_k", f"{first}_v"

    def repeated(self, x: str) -> str:
        """Each key or value head as often as query heads share it."""
        c = self.c
        if c.heads == c.kv_heads:
            return x
        wide = self.op("Unsqueeze", x, self.const([2]))
        wide = self.op("Expand", wide, self.const([1, 1, c.heads // c.kv_heads, 1, 1]))
        shape = self.op("Shape", x)
        batch, rest = (self.op("Slice", shape, self.const([a]), self.const([b])) for a, b in ((0, 1), (2, 4)))
        return self.op("Reshape", wide, self.op("Concat", batch, self.const([c.heads]), rest, axis=0))

    def decomposed(self, query: str, key: str, value: str) -> str:
        c = self.c
        turned = self.op("Transpose", self.repeated(key), perm=[0, 1, 3, 2])
        scores = self.op("MatMul", query, turned)
        factor = c.head_size**0.5
        scores = self.op(c.scale, scores, self.number(factor if c.scale == "Div" else 1 / factor))
        if c.mask == "Add":
            scores = self.op("Add", scores, self.bias)
        else:
            scores = self.op("Where", self.allowed, scores, self.lowest)
        shares = self.op("Softmax", scores, axis=-1)
        if c.nan_guard:
            shares = self.op("Where", self.op("IsNaN", shares), self.number(0), shares)
        return self.op("MatMul", shares, self.repeated(value))

    def fused(self, i: int, query: str, key: str, value: str) -> str:
        inside = self.c.attention == "Attention with past" and self.c.cache != "none"
        past = self.past[i] if inside else ()
        mixed = self.op("Attention", query, key, value, self.allowed, *past, scale=self.c.head_size**-0.5)
        self.nodes[-1].output.extend(self.present[i] if inside else ())
        return mixed

    def microsoft(self, i: int, query: str, key: str, value: str) -> str:
        c = self.c
        past, present = (self.past[i], self.present[i]) if c.cache != "none" else ((), ())
        if c.attention == "MultiHeadAttention":
            self.masks()
            arguments: Sequence[str] = (query, key, value, "", "", self.bias, *past)
            mixed = self.op(c.attention, *arguments, domain=MICROSOFT, num_heads=c.heads)
        else:
            if not self.total:
                counted = self.op("ReduceSum", "attention_mask", self.const([1]), keepdims=0)
                lengths = self.op("Sub", counted, self.const([1]))
                self.lengths = self.cast(lengths, TensorProto.INT32)
                self.total = self.cast(self.start_and_stop()[1], TensorProto.INT32)
            mixed = self.op(
                c.attention,
                *(query, key, value, *past, self.lengths, self.total),
                domain=MICROSOFT,
                num_heads=c.heads,
                kv_num_heads=c.kv_heads,
            )
        self.nodes[-1].output.extend(present)
        return mixed

    # the model -----------------------------------------------------------------------------------

    def proto(self) -> onnx.ModelProto:
        c = self.c
        read = {name for node in self.nodes for name in node.input}
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length])
            for name, length in (("input_ids", "seq"), ("attention_mask", "total"), ("position_ids", "seq"))
            if name in read
        ]
        sizes = (c.kv_heads, c.head_size)
        past = [_cached(name, *sizes, "past") for pair in self.past for name in pair]
        present = [_cached(name, *sizes, "total") for pair in self.present for name in pair]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", None])
        if c.shuffled:
            rng = random.Random(c.seed)
            rng.shuffle(past)
            rng.shuffle(present)
        outputs = [*present, logits] if c.logits_last else [logits, *present]
        graph = helper.make_graph(
            self.nodes,
            "decoder",
            [*inputs, *past],
            outputs,
            [t for n, t in self.initializers.items() if n in read],
        )
        opsets = [helper.make_opsetid("", c.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def _cached(name: str, heads: int, size: int, length: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", heads, length, size])
