"""Small random decoders: how they are written as a graph, and what they compute in float64 NumPy.

A decoder is a set of :class:`Choices` and :class:`Weights`. :func:`forward` here is the oracle: it is
written from the architectures' papers and knows no graph. :mod:`tests.end_to_end.random_decoder_graphs` writes
the same decoder as ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from nbl_export.linearize.plan import LinearLayer, Plan
from nbl_export.settings.choices import FitInput
from tests.fixtures_graph import pad_left, ragged_rows

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


def possible(c: Choices) -> Choices:
    """The nearest choices that go together: the operators' specifications rule some out."""
    changes: dict[str, Any] = {}
    if c.attention == "MultiHeadAttention":
        changes["kv_heads"] = c.heads
    elif c.heads % c.kv_heads:
        changes["kv_heads"] = 1
    if c.attention == "GroupQueryAttention" and c.cache == "none":
        changes["cache"] = "usual"
    # A fused attention hands its present out after it has read the mask, which would be computed from it.
    inside = c.attention not in ("decomposed", "Attention")
    cache = changes.get("cache", c.cache)
    if c.length == "present" and (inside or cache == "none"):
        changes["length"] = "past"
    if changes.get("length", c.length) == "present":
        changes["positions"] = "input"
    if c.o_bias == "skip norm" and c.block != "fused":
        changes["o_bias"] = "Add"
    if c.o_bias == "inside" and c.linear not in ("Gemm", "Gemm transposed", "MatMulNBits"):
        changes["o_bias"] = "Add"
    if c.block == "fused" and c.norm in ("RMSNormalization", "decomposed"):
        changes["norm"] = "SimplifiedLayerNormalization"
    if c.attention != "decomposed":
        changes |= {"nan_guard": False, "scale": "Mul", "mask": "Add"}
    elif c.nan_guard:
        changes["mask"] = "Add"
    changed = replace(c, **changes)
    if changed.attention.startswith("Attention") or changed.norm != "decomposed":
        changed = replace(changed, opset=23)
    return changed


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

    def values(self) -> Array:
        stored = (self.numbers.astype(np.float64) - self.zeros[..., None]) * self.scales[..., None]
        return stored.reshape(len(stored), -1)[:, : self.rows].T


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

    def get(self, name: str) -> Array | None:
        return self.arrays.get(name)

    def stored(self) -> Weights:
        """What the graph computes with: quantized matrices as they come out of their blocks."""
        return replace(self, arrays={**self.arrays, **{n: q.values() for n, q in self.blocks.items()}})


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


# what it computes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trace:
    """One row of tokens through the decoder, float64: logits, and by layer x, h, y [n, d] and the cache.

    ``keys`` and ``values`` [kv heads, n, size] are None for layers that were replaced, unless they are borrowed.
    """

    logits: Array
    x: list[Array]
    h: list[Array]
    y: list[Array]
    keys: list[Array | None]
    values: list[Array | None]


def forward(c: Choices, weights: Weights, tokens: Array, plan: Plan | None = None) -> Trace:
    """The decoder on one row [n], all at once; the layers of ``plan`` are W u + b instead of attention."""
    w = {n: a.astype(np.float64) for n, a in weights.arrays.items()}
    h = w["embed"][tokens] + w["positions"][: len(tokens)]
    trace = Trace(h, [], [], [], [], [])
    for i in range(c.layers):

        def norm(name: str, value: Array, i: int = i) -> Array:
            return _norm(c, w, f"{i}.{name}", value)

        x = h if c.block == "post" else norm("before", h)
        key, value = None, None
        if plan is not None and i in plan.layers:
            u = x if plan.fit_input == "normed" else h
            y = u @ plan.layers[i].w.T.astype(np.float64) + plan.layers[i].b
            if c.borrows:
                _, key, value = _attention(c, w, i, x)
        else:
            borrowed = (trace.keys[-1], trace.values[-1]) if c.borrows and i == c.layers - 1 else None
            y, key, value = _attention(c, w, i, x, borrowed)
        for kept, what in zip((trace.x, trace.h, trace.y), (x, h, y), strict=True):
            kept.append(what)
        trace.keys.append(key)
        trace.values.append(value)
        if c.block.startswith("parallel"):
            h = h + y + _mlp(w, i, x if c.block == "parallel" else norm("mlp before", h))
            continue
        h = h + (norm("after", y) if c.block in ("post", "sandwich") else y)
        m = _mlp(w, i, h if c.block == "post" else norm("mlp before", h))
        h = h + (norm("mlp after", m) if c.block in ("post", "sandwich") else m)
    return replace(trace, logits=_norm(c, w, "last", h) @ w["head"])


def _norm(c: Choices, w: Mapping[str, Array], name: str, x: Array) -> Array:
    if c.centered:
        x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON)
    return x * w[f"{name}.scale"] + w.get(f"{name}.bias", 0)


def _mlp(w: Mapping[str, Array], i: int, x: Array) -> Array:
    return np.maximum(x @ w[f"{i}.up"], 0) @ w[f"{i}.down"]


def _attention(
    c: Choices, w: Mapping[str, Array], i: int, x: Array, borrowed: tuple[Any, Any] | None = None
) -> tuple[Array, Array, Array]:
    def heads(name: str, count: int) -> Array:
        rows = x @ w[f"{i}.{name}"] + w.get(f"{i}.{name}.bias", 0)
        split = rows.reshape(len(x), count, c.head_size).transpose(1, 0, 2)
        return _norm(c, w, f"{i}.{name} norm", split) if c.qk_norm and name != "v" else split

    query, key, value = heads("q", c.heads), heads("k", c.kv_heads), heads("v", c.kv_heads)
    key, value = borrowed or (key, value)
    groups = c.heads // c.kv_heads
    scores = query @ np.repeat(key, groups, 0).transpose(0, 2, 1) / c.head_size**0.5
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = scores / scores.sum(-1, keepdims=True) @ np.repeat(value, groups, 0)
    joined = mixed.transpose(1, 0, 2).reshape(len(x), -1)
    return joined @ w[f"{i}.o"] + w.get(f"{i}.o.bias", 0), key, value


# the plan ----------------------------------------------------------------------------------------


def random_plan(
    c: Choices, weights: Weights, layers: Sequence[int], fit_input: FitInput, seed: int = 1
) -> Plan:
    """A plan of random maps; its probe is what the decoder of ``weights``, unquantized, computes."""
    rng = np.random.default_rng(seed)
    rows = ragged_rows((9, 6, 11), VOCAB, seed)
    ids, mask, positions = pad_left(rows)
    traces = [forward(c, weights, row) for row in rows]

    def probe(what: str) -> dict[int, Array]:
        return {
            i: np.concatenate([getattr(t, what)[i] for t in traces]).astype(np.float32)
            for i in range(c.layers)
        }

    def linear() -> LinearLayer:
        w = rng.standard_normal((c.width, c.width)) / c.width**0.5
        if c.quantized:
            w = _on_the_grid(rng, c)
        return LinearLayer(w.astype(np.float32), rng.standard_normal(c.width).astype(np.float32))

    return Plan(
        model="random",
        hidden_size=c.width,
        layer_count=c.layers,
        fit_input=fit_input,
        criterion="by hand",
        ridge=0.0,
        calibration_tokens=sum(map(len, rows)),
        layers={i: linear() for i in layers},
        probe={"input_ids": ids, "attention_mask": mask, "position_ids": positions},
        probe_u=probe("x" if fit_input == "normed" else "h"),
        probe_y=probe("y"),
    )


def _on_the_grid(rng: np.random.Generator, c: Choices) -> Array:
    """Numbers that 4 bits hold exactly, so that the rewritten graph can be compared to the last digit."""
    numbers = rng.integers(-7, 8, (c.width, c.width))
    numbers[:, 0] = -8  # the end of the range is met in every block
    if not c.symmetric:
        numbers[:, 1] = 7
    return numbers / 16
