"""Choose small random decoders: a set of :class:`Choices` and :class:`Weights`.

:mod:`tests.end_to_end.random_decoder_graphs` writes them as ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]
VOCAB, POSITIONS, EPSILON = 24, 32, 1e-5
BLOCK = 16  # of quantized weights

ATTENTIONS = (
    "decomposed",
    "Attention",
    "Attention with past",
    "MultiHeadAttention",
    "GroupQueryAttention",
)
LINEARS = ("MatMul", "Transpose", "Gemm", "Gemm transposed", "MatMulNBits")
NORMS = ("RMSNormalization", "decomposed", "LayerNormalization", "SimplifiedLayerNormalization")
BLOCKS = ("pre", "post", "sandwich", "parallel", "parallel, two norms", "fused")
O_BIASES = ("none", "Add", "inside", "before Reshape", "after Reshape", "skip norm")
CACHES = ("usual", "numbered", "arbitrary", "none")
LENGTHS = ("past", "present", "mask")


@dataclass(frozen=True)
class Choices:
    """One decoder and the way it is written.

    ``nan_guard`` is optimum's: -inf masks, and Where(IsNaN(p), 0, p). ``length`` says what the cache's length is
    read from, ``positions`` whether they are an input or counted from that length. ``shuffled`` shuffles the
    order of cache inputs and outputs, ``logits_last`` puts them first. ``borrows`` lets the last layer
    attend to the keys and values of the one before, as in Gemma 3n; it has no cache of its own then.
    """

    seed: int = 0
    layers: int = 2
    width: int = 8
    heads: int = 2
    kv_heads: int = 2
    attention: str = "decomposed"
    nan_guard: bool = False
    scale: str = "Mul"
    mask: str = "Add"
    packing: str = "separate"
    linear: str = "MatMul"
    symmetric: bool = True
    qkv_bias: bool = False
    o_bias: str = "none"
    norm: str = "RMSNormalization"
    qk_norm: bool = False
    block: str = "pre"
    cache: str = "usual"
    shuffled: bool = False
    length: str = "past"
    positions: str = "input"
    tied: bool = False
    shared: bool = False
    logits_last: bool = False
    borrows: bool = False
    opset: int = 23

    @property
    def head_size(self) -> int:
        return 16 if self.attention == "GroupQueryAttention" else 4

    @property
    def quantized(self) -> bool:
        return self.linear == "MatMulNBits"

    @property
    def centered(self) -> bool:
        """Whether norms subtract the mean and add a bias, as LayerNorm does."""
        return self.norm == "LayerNormalization"


# What goes together, since the operators' specifications rule the rest out: where the first holds, the second changes.
RULES: tuple[tuple[Callable[[Choices], bool], Callable[[Choices], dict[str, Any]]], ...] = (
    (lambda c: c.attention == "MultiHeadAttention", lambda c: {"kv_heads": c.heads}),
    (lambda c: c.heads % c.kv_heads != 0, lambda c: {"kv_heads": 1}),
    (lambda c: c.attention == "GroupQueryAttention" and c.cache == "none", lambda c: {"cache": "usual"}),
    # A fused attention hands its present out after it has read the mask, which would be computed from it.
    (
        lambda c: c.length == "present" and (c.attention not in ATTENTIONS[:2] or c.cache == "none"),
        lambda c: {"length": "past"},
    ),
    (lambda c: c.length == "present", lambda c: {"positions": "input"}),
    (lambda c: c.o_bias == "skip norm" and c.block != "fused", lambda c: {"o_bias": "Add"}),
    (lambda c: c.o_bias == "inside" and c.linear not in LINEARS[2:], lambda c: {"o_bias": "Add"}),
    (
        lambda c: c.block == "fused" and c.norm in ("RMSNormalization", "decomposed"),
        lambda c: {"norm": "SimplifiedLayerNormalization"},
    ),
    (lambda c: c.attention != "decomposed", lambda c: {"nan_guard": False, "scale": "Mul", "mask": "Add"}),
    (lambda c: c.nan_guard, lambda c: {"mask": "Add"}),
    (lambda c: c.attention.startswith("Attention") or c.norm != "decomposed", lambda c: {"opset": 23}),
)


def possible(c: Choices) -> Choices:
    """The nearest choices that go together."""
    for holds, change in RULES:
        c = replace(c, **change(c)) if holds(c) else c
    return c


@st.composite
def choices(draw: st.DrawFn) -> Choices:
    """Any decoder that can be written."""
    pick = st.sampled_from
    heads = draw(pick((1, 2, 4)))
    return possible(
        Choices(
            seed=draw(st.integers(0, 2**31)),
            layers=draw(st.integers(1, 4)),
            width=draw(pick((8, 12, 16))),
            heads=heads,
            kv_heads=draw(pick([k for k in (1, 2, 4) if heads % k == 0])),
            attention=draw(pick(ATTENTIONS)),
            nan_guard=draw(st.booleans()),
            scale=draw(pick(("Mul", "Div"))),
            mask=draw(pick(("Add", "Where"))),
            packing=draw(pick(("separate", "Split", "Slice"))),
            linear=draw(pick(LINEARS)),
            symmetric=draw(st.booleans()),
            qkv_bias=draw(st.booleans()),
            o_bias=draw(pick(O_BIASES)),
            norm=draw(pick(NORMS)),
            qk_norm=draw(st.booleans()),
            block=draw(pick(BLOCKS)),
            cache=draw(pick(CACHES)),
            shuffled=draw(st.booleans()),
            length=draw(pick(LENGTHS)),
            positions=draw(pick(("input", "counted"))),
            tied=draw(st.booleans()),
            shared=draw(st.booleans()),
            logits_last=draw(st.booleans()),
            opset=draw(pick((14, 17, 23))),
        )
    )


# weights -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantized:
    """A matrix [in, out] in blocks of 4 bits along its input: numbers [out, blocks, BLOCK], the rest [out, blocks]."""

    numbers: Array
    scales: Array
    zeros: Array
    rows: int


def quantized(matrix: Array, symmetric: bool) -> Quantized:
    rows, columns = matrix.shape
    count = -(-rows // BLOCK)
    padded = np.zeros((columns, count * BLOCK))
    padded[:, :rows] = matrix.T
    blocks = padded.reshape(columns, count, BLOCK)
    if symmetric:
        scales = np.float32(np.abs(blocks).max(-1) / 7)
        zeros = np.full(scales.shape, 8)
    else:
        low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
        scales = np.float32((high - low) / 15)
        zeros = np.clip(np.rint(-low / scales), 0, 15).astype(int)
    numbers = np.clip(np.rint(blocks / scales[..., None]) + zeros[..., None], 0, 15).astype(np.uint8)
    return Quantized(numbers, scales, zeros.astype(np.uint8), rows)


@dataclass(frozen=True)
class Weights:
    """Vectors and matrices [in, out] by name, ``LAYER.WHAT``; ``blocks`` holds the matrices that are quantized.

    The embeddings are ``embed`` and ``positions``, the logits ``head``.
    """

    arrays: Mapping[str, Array]
    blocks: Mapping[str, Quantized]


def random_weights(c: Choices) -> Weights:
    """Weights by ``c.seed``, such that every part of the decoder matters; all are float32 numbers."""
    rng = np.random.default_rng(c.seed)
    d, q, kv = c.width, c.heads * c.head_size, c.kv_heads * c.head_size
    arrays: dict[str, Array] = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        arrays[name] = rng.standard_normal((rows, columns)) * gain / rows**0.5

    def norm(name: str, size: int) -> None:
        arrays[f"{name}.scale"] = 1 + 0.3 * rng.standard_normal(size)
        if c.centered:
            arrays[f"{name}.bias"] = 0.3 * rng.standard_normal(size)

    arrays["embed"] = rng.standard_normal((VOCAB, d))
    arrays["positions"] = 0.5 * rng.standard_normal((POSITIONS, d))
    for i in range(c.layers):
        for name, columns in (("q", q), ("k", kv), ("v", kv)):
            matrix(f"{i}.{name}", d, columns, 2.0)
            if c.qkv_bias:
                arrays[f"{i}.{name}.bias"] = 0.5 * rng.standard_normal(columns)
        matrix(f"{i}.o", q, d, 2.0)
        if c.o_bias != "none":
            arrays[f"{i}.o.bias"] = 0.5 * rng.standard_normal(d)
        matrix(f"{i}.up", d, 2 * d)
        matrix(f"{i}.down", 2 * d, d)
        for name in ("before", "after", "mlp before", "mlp after"):
            norm(f"{i}.{name}", d)
        for name in ("q norm", "k norm"):
            norm(f"{i}.{name}", c.head_size)
    norm("last", d)
    matrix("head", d, VOCAB)
    if c.shared:  # one attention for all layers, as in ALBERT
        own = {n for n in arrays if n.partition(".")[2].split(".")[0] in ("q", "k", "v", "o")}
        arrays |= {n: arrays[f"0.{n.partition('.')[2]}"] for n in own}
    arrays = {n: a.astype(np.float32) for n, a in arrays.items()}
    if c.tied:
        arrays["head"] = arrays["embed"].T
    linear = {"q", "k", "v", "o", "up", "down"}
    blocks = {
        n: quantized(a, c.symmetric)
        for n, a in arrays.items()
        if c.quantized and a.ndim == 2 and n.partition(".")[2] in linear
    }
    return Weights(arrays, blocks)
