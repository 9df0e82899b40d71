"""Write model + plan as a GGUF file that llama.cpp runs, one tensor in memory at a time; check what it stores.

llama.cpp's architecture ``deci`` knows linear attention. A block of it is an attention and an MLP, each behind its
norm. Its attention may be a matrix alone (heads, but none of keys and values) or nothing (no heads). The bias of such a
matrix is not added, but that of an MLP is: so a linear layer is a block of its own, whose MLP is zero but for its bias.

    layer i      attention(i), MLP(i)            W, b, MLP(i)
    blocks       [attention i, MLP i]            [W, zeros + b]  [nothing, MLP i]

Queries and keys are in the order of llama.cpp's rotary embedding, whose pairs are neighbours; transformers' are halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32
from nbl_export.blocks import Block, Mlp, layer_of
from nbl_export.convert.gguf_tokenizer import TokenizerFields
from nbl_export.convert.llama import LAYERS, check_like_llama, numbers, rope_base, rope_factors
from nbl_export.errors import InputError
from nbl_export.files import atomic_path
from nbl_export.linearize.plan import Plan
from nbl_export.progress import Listener, bytes_task
from nbl_export.records import Check
from nbl_export.settings.graphs import GGUF_TYPES

ARCHITECTURE = "deci"
# The inner width of an MLP of zeros: as narrow as the blocks of quantized formats allow.
ZEROS = 32
# What llama.cpp's own quantizer makes of a file in float32.
QUANTIZED = ("Q4_K_M",)
# How weights are stored here, by the name that llama.cpp has for a file of them.
FORMATS = tuple(form for form in GGUF_TYPES.values() if form not in QUANTIZED)
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
# The largest error of a number, over the largest of its 32 neighbours: half a step of the format, and that of a scale.
_HALF_STEP = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + 2**-11}
_AROUND = 32


@dataclass(frozen=True)
class DeciBlock:
    """One block: the layer whose ``attention`` it has, or the block that is ``linear`` in it, and the layer of its
    ``mlp``; where there is none, the MLP is zeros and the bias of ``linear``.
    """

    attention: int | None = None
    linear: Block | None = None
    mlp: int | None = None

    @property
    def has_heads(self) -> bool:
        """Whether it has an attention or a matrix in its place, if only of zeros where it has nothing at all."""
        return self.attention is not None or self.linear is not None or self.mlp is None


def blocks_of(plan: Plan) -> tuple[DeciBlock, ...]:
    """The blocks of the model with ``plan``, in order; the first has heads, as the architecture asks for."""
    found: list[DeciBlock] = []
    chosen = set(plan.chosen)
    for layer in range(plan.layer_count):
        mlp = Mlp(layer)
        kept = None if mlp in chosen else layer
        if layer not in chosen:
            found.append(DeciBlock(attention=layer, mlp=kept))
        else:
            found += [DeciBlock(linear=layer)] if layer in plan.layers else []
            found += [DeciBlock(mlp=kept)] if kept is not None else []
        found += [DeciBlock(linear=mlp)] if mlp in plan.layers else []
    if not found or not found[0].has_heads:
        found.insert(0, DeciBlock())
    return tuple(found)


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its ``shape``, and what gives its numbers; a matrix is stored in the file's format."""

    name: str
    shape: tuple[int, ...]
    numbers: Callable[[], F32]
    whole: bool = False


def write_gguf(
    path: Path, model: torch.nn.Module, plan: Plan, tokenizer: TokenizerFields, form: str, listener: Listener
) -> None:
    """Write ``model``, a decoder like Llama, with ``plan`` to ``path`` in the format ``form`` of :data:`FORMATS`.

    Atomically. Raises :class:`InputError`, before anything is written, for what a file cannot hold.
    """
    check_like_llama(model, plan, "llama.cpp")
    blocks = blocks_of(plan)
    tensors = [(tensor, _kind(tensor, form)) for tensor in _tensors(model, plan, blocks)]
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        try:
            _describe(writer, model, blocks, form)
            tokenizer.write(writer)
            sizes = []
            for tensor, kind in tensors:
                shape, dtype = _stored(tensor.shape, kind)
                sizes.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
                writer.add_tensor_info(tensor.name, shape, dtype, sizes[-1], kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with bytes_task(listener, f"Writing {path.name}", sum(sizes)) as done:
                for (tensor, kind), size in zip(tensors, sizes, strict=True):
                    writer.write_tensor_data(_as_stored(tensor, kind))
                    done(size)
        finally:
            writer.close()


def matrices_of(plan: Plan) -> tuple[str, ...]:
    """The names of the tensors that are W."""
    return tuple(
        f"blk.{n}.attn_output.weight" for n, block in enumerate(blocks_of(plan)) if block.linear is not None
    )


def _describe(writer: Any, model: torch.nn.Module, blocks: Sequence[DeciBlock], form: str) -> None:
    config: Any = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(Path(str(config.name_or_path or type(model).__name__)).name)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if form == "F32" else f"MOSTLY_{form}"))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(len(blocks))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length([ZEROS if b.mlp is None else config.intermediate_size for b in blocks])
    # A block without an attention has no heads, one with a matrix in its place none of keys and values.
    writer.add_head_count([heads if b.has_heads else 0 for b in blocks])
    writer.add_head_count_kv([0 if b.attention is None else kv_heads for b in blocks])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope_base(model))


def _tensors(model: torch.nn.Module, plan: Plan, blocks: Sequence[DeciBlock]) -> Iterator[_Tensor]:
    """Those beside the blocks, then those of each block."""
    config: Any = model.config
    d = plan.hidden_size
    ordered = {"q": config.num_attention_heads, "k": config.num_key_value_heads}

    def own(name: str, parameter: str, heads: int = 0) -> _Tensor:
        """A tensor of the model; ``heads`` of queries or keys are put in llama.cpp's order."""

        def read() -> F32:
            found = numbers(model, plan, parameter)
            return _neighbours(found, heads) if heads else found

        return _Tensor(name, tuple(model.get_parameter(parameter).shape), read)

    def projections(at: str, module: str, names: Mapping[str, str]) -> Iterator[_Tensor]:
        for name, projection in names.items():
            for kind in ("weight", "bias"):  # that there is
                if getattr(model.get_submodule(f"{module}.{projection}"), kind, None) is not None:
                    yield own(f"{at}_{name}.{kind}", f"{module}.{projection}.{kind}", ordered.get(name, 0))

    def constant(name: str, value: float, *shape: int) -> _Tensor:
        return _Tensor(name, shape, lambda: np.full(shape, value, np.float32))

    yield own("token_embd.weight", "model.embed_tokens.weight")
    yield own("output_norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield own("output.weight", "lm_head.weight")
    if (factors := rope_factors(model)) is not None:
        yield _Tensor("rope_freqs.weight", tuple(factors.shape), factors.numpy)
    for number, block in enumerate(blocks):
        at, linear = f"blk.{number}", None if block.linear is None else plan.layers[block.linear]
        if block.attention is not None:
            layer = f"{LAYERS}.{block.attention}"
            yield own(f"{at}.attn_norm.weight", f"{layer}.input_layernorm.weight")
            yield from projections(f"{at}.attn", f"{layer}.self_attn", _ATTENTION)
        elif linear is not None and block.linear is not None:  # W behind the norm of its block
            norm = "post_attention_layernorm" if isinstance(block.linear, Mlp) else "input_layernorm"
            yield own(f"{at}.attn_norm.weight", f"{LAYERS}.{layer_of(block.linear)}.{norm}.weight")
            yield _Tensor(f"{at}.attn_output.weight", (d, d), lambda one=linear: one.w, whole=True)  # type: ignore[misc]
        elif block.has_heads:
            yield constant(f"{at}.attn_norm.weight", 1, d)
            yield constant(f"{at}.attn_output.weight", 0, d, d)
        if block.mlp is not None:
            layer = f"{LAYERS}.{block.mlp}"
            yield own(f"{at}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight")
            yield from projections(f"{at}.ffn", f"{layer}.mlp", _MLP)
            continue
        yield constant(f"{at}.ffn_norm.weight", 1, d)
        for name, shape in (("gate", (ZEROS, d)), ("up", (ZEROS, d)), ("down", (d, ZEROS))):
            yield constant(f"{at}.ffn_{name}.weight", 0, *shape)
        if linear is not None:
            yield _Tensor(f"{at}.ffn_down.bias", (d,), lambda one=linear: one.b)  # type: ignore[misc]


def _neighbours(rows: F32, heads: int) -> F32:
    """``rows`` [heads · head_dim, …] with each head's two halves interleaved."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _kind(tensor: _Tensor, form: str) -> Kind:
    """The type of a tensor in the file: matrices are in ``form``, vectors in float32.

    Rows that are no whole number of a quantized format's blocks are float16, as llama.cpp's own quantizer has them.
    """
    if len(tensor.shape) == 1:
        return Kind.F32
    kind = Kind[form]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return Kind.F16 if tensor.shape[-1] % block or (block > 1 and tensor.whole) else kind


def _stored(shape: tuple[int, ...], kind: Kind) -> tuple[tuple[int, ...], Any]:
    """The shape and dtype of the bytes of a tensor of that ``kind``."""
    plain = {Kind.F32: np.float32, Kind.F16: np.float16}
    return (shape, plain[kind]) if kind in plain else (gguf.quant_shape_to_byte_shape(shape, kind), np.uint8)


def _as_stored(tensor: _Tensor, kind: Kind) -> NDArray[Any]:
    found = np.ascontiguousarray(tensor.numbers(), dtype=np.float32)
    _, dtype = _stored(tensor.shape, kind)
    if dtype is np.uint8:
        quantized: NDArray[Any] = gguf.quants.quantize(found, kind)
        return quantized
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = found.astype(dtype)
    if not np.isfinite(stored).all():
        raise InputError(f"{tensor.name} has numbers that float16 does not have: use --precision bf16.")
    return stored


def check_stored(path: Path, plan: Plan) -> Check:
    """Whether the file at ``path`` has W, as far as its format is exact, and b of every linear layer of ``plan``."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    worst = 0.0
    for number, block in enumerate(blocks_of(plan)):
        if block.linear is None:
            continue
        own = plan.layers[block.linear]
        w, b = (tensors.get(f"blk.{number}.{name}") for name in ("attn_output.weight", "ffn_down.bias"))
        if w is None or b is None:
            return Check("linear layers", "failed", f"layer {block.linear} is not in the file")
        error = _largest_error(gguf.dequantize(w.data, w.tensor_type), own.w)
        if not error <= _HALF_STEP[w.tensor_type.name] * 1.01:
            why = f"W that is off by {error:.2g} of the largest number near it"
        elif not np.array_equal(gguf.dequantize(b.data, b.tensor_type), own.b):
            why = "another b"
        else:
            worst = max(worst, error)
            continue
        return Check("linear layers", "failed", f"layer {block.linear} has {why}")
    exact = "exactly" if worst == 0 else f"to {worst:.2g} of the largest number near each"
    return Check("linear layers", "passed", f"W and b of {len(plan.layers)} are in the file, W {exact}")


def _largest_error(stored: F32, w: F32) -> float:
    """The largest error, over the largest number of the 32 that a format may scale together."""
    if stored.shape != w.shape:
        return float("inf")
    width = _AROUND if w.shape[1] % _AROUND == 0 else w.shape[1]
    rows = w.reshape(-1, width)
    off = np.abs(stored.reshape(-1, width) - rows)
    return float(np.max(off / np.maximum(np.abs(rows).max(1, keepdims=True), np.finfo(np.float32).tiny)))
