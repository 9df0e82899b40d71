"""Model + plan → a GGUF file that llama.cpp runs: one tensor in memory at a time.

Queries and keys are in the order of llama.cpp's rotary embedding, whose pairs are neighbours; transformers' are halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32
from nbl_export.blocks import Block, Mlp, layer_of
from nbl_export.convert.deci import ARCHITECTURE, ZEROS, DeciBlock, blocks_of
from nbl_export.convert.gguf_tokenizer import TokenizerFields
from nbl_export.convert.llama import LAYERS, check_like_llama, numbers, rope_base, rope_factors
from nbl_export.errors import InputError
from nbl_export.files import atomic_path
from nbl_export.linearize.plan import Plan
from nbl_export.progress import Listener, bytes_task
from nbl_export.settings.converting import GGUF_TYPES

if TYPE_CHECKING:
    import torch

# What llama.cpp's own quantizer makes of a file in float32.
QUANTIZED = ("Q4_K_M",)
# How weights are stored here, by the name that llama.cpp has for a file of them.
FORMATS = tuple(form for form in GGUF_TYPES.values() if form not in QUANTIZED)
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "o_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


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
    from gguf import GGUFWriter

    check_like_llama(model, plan, "llama.cpp")
    blocks = blocks_of(plan)
    tensors = list(_Source(model, plan).tensors(blocks))
    kinds = {tensor.name: _kind(tensor, form) for tensor in tensors}
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, ARCHITECTURE)
        try:
            _describe(writer, model, blocks, form)
            tokenizer.write(writer)
            sizes = {}
            for tensor in tensors:
                shape, dtype = _stored(tensor.shape, kinds[tensor.name])
                sizes[tensor.name] = int(np.prod(shape)) * np.dtype(dtype).itemsize
                writer.add_tensor_info(tensor.name, shape, dtype, sizes[tensor.name], kinds[tensor.name])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            with bytes_task(listener, f"Writing {path.name}", sum(sizes.values())) as done:
                for tensor in tensors:
                    writer.write_tensor_data(_as_stored(tensor, kinds[tensor.name]))
                    done(sizes[tensor.name])
        finally:
            writer.close()


def matrices_of(plan: Plan) -> tuple[str, ...]:
    """The names of the tensors that are W."""
    return tuple(
        f"blk.{n}.attn_output.weight" for n, block in enumerate(blocks_of(plan)) if block.linear is not None
    )


def _describe(writer: Any, model: torch.nn.Module, blocks: Sequence[DeciBlock], form: str) -> None:
    import gguf

    config: Any = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(Path(str(config.name_or_path or type(model).__name__)).name)
    writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(form)))
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


def _file_type(form: str) -> str:
    return {"F32": "ALL_F32"}.get(form, f"MOSTLY_{form}")


@dataclass(frozen=True)
class _Source:
    """Where the tensors of a file come from: a model like Llama, and the plan."""

    model: torch.nn.Module
    plan: Plan

    @property
    def width(self) -> int:
        return self.plan.hidden_size

    def tensors(self, blocks: Sequence[DeciBlock]) -> Iterator[_Tensor]:
        """Those beside the blocks, then those of each block."""
        config: Any = self.model.config
        yield self._own("token_embd.weight", "model.embed_tokens.weight")
        yield self._own("output_norm.weight", "model.norm.weight")
        if not config.tie_word_embeddings:
            yield self._own("output.weight", "lm_head.weight")
        if (factors := rope_factors(self.model)) is not None:
            yield _Tensor("rope_freqs.weight", tuple(factors.shape), factors.numpy)
        for number, block in enumerate(blocks):
            at = f"blk.{number}"
            if block.attention is not None:
                yield from self._attention(at, f"{LAYERS}.{block.attention}", config)
            elif block.has_heads:
                yield from self._linear(at, block.linear)
            if block.mlp is not None:
                yield from self._mlp(at, f"{LAYERS}.{block.mlp}")
            else:
                yield from self._zeros(at, block.linear)

    def _own(self, name: str, parameter: str, heads: int = 0) -> _Tensor:
        """A tensor of the model; ``heads`` of queries or keys are put in llama.cpp's order."""

        def read() -> F32:
            found = numbers(self.model, self.plan, parameter)
            return _neighbours(found, heads) if heads else found

        return _Tensor(name, tuple(self.model.get_parameter(parameter).shape), read)

    def _projections(self, at: str, module: str, names: Mapping[str, str], **heads: int) -> Iterator[_Tensor]:
        """The weights, and the biases that there are, of the projections of a ``module``."""
        for name, projection in names.items():
            for kind in ("weight", "bias"):
                if getattr(self.model.get_submodule(f"{module}.{projection}"), kind, None) is not None:
                    own = f"{module}.{projection}.{kind}"
                    yield self._own(f"{at}_{name}.{kind}", own, heads.get(name, 0))

    def _attention(self, at: str, layer: str, config: Any) -> Iterator[_Tensor]:
        yield self._own(f"{at}.attn_norm.weight", f"{layer}.input_layernorm.weight")
        q, k = config.num_attention_heads, config.num_key_value_heads
        yield from self._projections(f"{at}.attn", f"{layer}.self_attn", _ATTENTION, q=q, k=k)

    def _linear(self, at: str, block: Block | None) -> Iterator[_Tensor]:
        """W behind the norm of its block, or zeros where there is none."""
        d = self.width
        if block is None:
            yield _constant(f"{at}.attn_norm.weight", 1, d)
            yield _constant(f"{at}.attn_output.weight", 0, d, d)
            return
        norm = "post_attention_layernorm" if isinstance(block, Mlp) else "input_layernorm"
        yield self._own(f"{at}.attn_norm.weight", f"{LAYERS}.{layer_of(block)}.{norm}.weight")
        yield _Tensor(f"{at}.attn_output.weight", (d, d), lambda: self.plan.layers[block].w, whole=True)

    def _mlp(self, at: str, layer: str) -> Iterator[_Tensor]:
        yield self._own(f"{at}.ffn_norm.weight", f"{layer}.post_attention_layernorm.weight")
        yield from self._projections(f"{at}.ffn", f"{layer}.mlp", _MLP)

    def _zeros(self, at: str, block: Block | None) -> Iterator[_Tensor]:
        """An MLP that only adds the bias of a ``block``."""
        d = self.width
        yield _constant(f"{at}.ffn_norm.weight", 1, d)
        for name, shape in (("gate", (ZEROS, d)), ("up", (ZEROS, d)), ("down", (d, ZEROS))):
            yield _constant(f"{at}.ffn_{name}.weight", 0, *shape)
        if block is not None:
            yield _Tensor(f"{at}.ffn_down.bias", (d,), lambda: self.plan.layers[block].b)


def _constant(name: str, value: float, *shape: int) -> _Tensor:
    return _Tensor(name, shape, lambda: np.full(shape, value, np.float32))


def _neighbours(rows: F32, heads: int) -> F32:
    """``rows`` [heads · head_dim, …] with each head's two halves interleaved."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _kind(tensor: _Tensor, form: str) -> Any:
    """The type of a tensor in the file: matrices are in ``form``, vectors in float32.

    Rows that are no whole number of a quantized format's blocks are float16, as llama.cpp's own quantizer has them.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(tensor.shape) == 1:
        return GGMLQuantizationType.F32
    kind = GGMLQuantizationType[form]
    block, _ = GGML_QUANT_SIZES[kind]
    return GGMLQuantizationType.F16 if tensor.shape[-1] % block or (block > 1 and tensor.whole) else kind


def _stored(shape: tuple[int, ...], kind: Any) -> tuple[tuple[int, ...], Any]:
    """The shape and dtype of the bytes of a tensor of that ``kind``."""
    from gguf import GGMLQuantizationType, quant_shape_to_byte_shape

    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        return shape, plain[kind]
    return quant_shape_to_byte_shape(shape, kind), np.uint8


def _as_stored(tensor: _Tensor, kind: Any) -> NDArray[Any]:
    from gguf import quants

    numbers = np.ascontiguousarray(tensor.numbers(), dtype=np.float32)
    _, dtype = _stored(tensor.shape, kind)
    with np.errstate(over="ignore"):
        stored: NDArray[Any] = (
            numbers.astype(dtype) if dtype is not np.uint8 else quants.quantize(numbers, kind)
        )
    if dtype is np.float16 and not np.isfinite(stored).all():
        raise InputError(f"{tensor.name} has numbers that float16 does not have: use --precision bf16.")
    return stored
