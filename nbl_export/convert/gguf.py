"""Write model + plan as a GGUF file that llama.cpp runs, one tensor in memory at a time; check what it stores.

llama.cpp's architecture ``deci`` knows linear attention. A block of it is an attention and an MLP, each behind its
norm. Its attention may be a matrix alone (heads, but none of keys and values) or nothing (no heads). The bias of such a
matrix is not added, but that of an MLP is: so a linear layer is a block of its own, whose MLP is zero but for its bias.

    layer i      attention(i), MLP(i)            W, b, MLP(i)
    blocks       [attention i, MLP i]            [W, zeros + b]  [nothing, MLP i]

Queries and keys are in the order of llama.cpp's rotary embedding, whose pairs are neighbours; transformers' are halves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Type
from gguf import TokenType as Token

from nbl_export.batch import F32
from nbl_export.blocks import Block, Mlp, layer_of
from nbl_export.convert.folders import LAYERS, check_like_llama, numbers, rope_base
from nbl_export.errors import InputError
from nbl_export.files import atomic_path, read_table
from nbl_export.linearize.plan import Plan
from nbl_export.progress import Listener
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
_NORMS = ("input_layernorm", "post_attention_layernorm")  # of an attention, and of an MLP
_BEYOND_F16 = 65520  # what is as large is infinite
# The largest error of a number, over the largest of its 32 neighbours: half a step of the format, and that of a scale.
_HALF_STEP = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 254 + 2**-11}
_AROUND = 32
_TYPES = {str: Type.STRING, bool: Type.BOOL, int: Type.UINT32, float: Type.FLOAT32}
_SPACE, _BYTE = "\u2581", re.compile(r"<0x..>")
# A tensor of the file: its name, its shape, and what gives its numbers.
_Tensor = tuple[str, tuple[int, ...], Callable[[], F32]]
# Fields of a file, each a key, a value and its type (and that of its elements).
Fields = Sequence[tuple[str, Any, Any, Any]]


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


def write_gguf(
    path: Path, model: torch.nn.Module, plan: Plan, tokenizer: Fields, form: str, listener: Listener
) -> None:
    """Write ``model``, a decoder like Llama, with ``plan`` to ``path`` in the format ``form`` of :data:`FORMATS`.

    Atomically. Raises :class:`InputError` for what a file cannot hold.
    """
    check_like_llama(model, plan, "llama.cpp")
    blocks, whole = blocks_of(plan), matrices_of(plan)
    tensors = list(_tensors(model, plan, blocks))
    with (
        atomic_path(path) as temporary,
        closing(gguf.GGUFWriter(temporary, ARCHITECTURE)) as writer,
        listener.task(f"Writing {path.name}", len(tensors), "tensors") as task,
    ):
        _describe(writer, model, blocks, form)
        for key, value, kind, element in tokenizer:
            writer.add_key_value(key, value, kind, sub_type=element)

        def read(name: str, kind: Kind, numbers: Callable[[], F32]) -> F32:
            found = np.ascontiguousarray(numbers(), dtype=np.float32)
            if kind == Kind.F16 and not np.abs(found).max() < _BEYOND_F16:
                raise InputError(f"{name} has numbers that float16 does not have: use --precision bf16.")
            task.advance(1)
            return found

        for name, shape, own in tensors:
            kind = Kind[form] if len(shape) > 1 else Kind.F32
            size, _ = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % size or (size > 1 and name in whole):  # as llama.cpp's own quantizer has them
                kind = Kind.F16
            meta = gguf.LazyNumpyTensor.meta_with_dtype_and_shape(np.dtype(np.float32), shape)
            lazy: Any = gguf.LazyNumpyTensor(meta=meta, args=(name, kind, own), func=read)
            writer.add_tensor(name, gguf.quants.quantize(lazy, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()  # which reads each and lets it go


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


def rope_factors(model: torch.nn.Module) -> torch.Tensor | None:
    """By what each frequency is divided [head_dim / 2], from the model's own; None where they are plain."""
    rotary: Any = model.get_submodule("model").rotary_emb
    own = rotary.inv_freq.float()
    plain = rope_base(model) ** (-2.0 / (2 * len(own)) * own.new_tensor(range(len(own))))
    factors: torch.Tensor = plain / own
    return None if bool((factors - 1).abs().max() < 1e-5) else factors


def _tensors(model: torch.nn.Module, plan: Plan, blocks: Sequence[DeciBlock]) -> Iterator[_Tensor]:
    """Those beside the blocks, then those of each block."""
    config: Any = model.config
    d = plan.hidden_size
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ordered = {"q": config.num_attention_heads, "k": config.num_key_value_heads}

    def own(name: str, parameter: str, heads: int = 0) -> _Tensor:
        """A tensor of the model; of ``heads`` of queries or keys the halves are interleaved, as llama.cpp has them."""

        def read() -> F32:
            found = numbers(model, plan, parameter)
            return (
                found.reshape(heads, 2, -1, *found.shape[1:]).swapaxes(1, 2).reshape(found.shape)
                if heads
                else found
            )

        return name, parameters[parameter], read

    def part(at: str, module: str, norm: str, projections: Mapping[str, str]) -> Iterator[_Tensor]:
        layer = module.rpartition(".")[0]
        yield own(f"{at}_norm.weight", f"{layer}.{norm}.weight")
        for name, projection in projections.items():
            for kind in ("weight", "bias"):  # that there is
                if (parameter := f"{module}.{projection}.{kind}") in parameters:
                    yield own(f"{at}_{name}.{kind}", parameter, ordered.get(name, 0))

    def constant(name: str, value: float, *shape: int) -> _Tensor:
        return name, shape, lambda: np.full(shape, value, np.float32)

    yield own("token_embd.weight", "model.embed_tokens.weight")
    yield own("output_norm.weight", "model.norm.weight")
    if not config.tie_word_embeddings:
        yield own("output.weight", "lm_head.weight")
    if (factors := rope_factors(model)) is not None:
        yield "rope_freqs.weight", tuple(factors.shape), factors.numpy
    for number, block in enumerate(blocks):
        at, linear = f"blk.{number}", None if block.linear is None else plan.layers[block.linear]
        if block.attention is not None:
            yield from part(f"{at}.attn", f"{LAYERS}.{block.attention}.self_attn", _NORMS[False], _ATTENTION)
        elif linear is not None and block.linear is not None:  # W behind the norm of its block
            norm = f"{LAYERS}.{layer_of(block.linear)}.{_NORMS[isinstance(block.linear, Mlp)]}"
            yield own(f"{at}.attn_norm.weight", f"{norm}.weight")
            yield f"{at}.attn_output.weight", (d, d), partial(getattr, linear, "w")
        elif block.has_heads:
            yield constant(f"{at}.attn_norm.weight", 1, d)
            yield constant(f"{at}.attn_output.weight", 0, d, d)
        if block.mlp is not None:
            yield from part(f"{at}.ffn", f"{LAYERS}.{block.mlp}.mlp", _NORMS[True], _MLP)
            continue
        yield constant(f"{at}.ffn_norm.weight", 1, d)
        for name, shape in (("gate", (ZEROS, d)), ("up", (ZEROS, d)), ("down", (d, ZEROS))):
            yield constant(f"{at}.ffn_{name}.weight", 0, *shape)
        if linear is not None:
            yield f"{at}.ffn_down.bias", (d,), partial(getattr, linear, "b")


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
        exact = error <= _HALF_STEP[w.tensor_type.name] * 1.01
        if not exact or not np.array_equal(gguf.dequantize(b.data, b.tensor_type), own.b):
            why = "another b" if exact else f"W that is off by {error:.2g} of the largest number near it"
            return Check("linear layers", "failed", f"layer {block.linear} has {why}")
        worst = max(worst, error)
    exactly = "exactly" if worst == 0 else f"to {worst:.2g} of the largest number near each"
    return Check("linear layers", "passed", f"W and b of {len(plan.layers)} are in the file, W {exactly}")


def _largest_error(stored: F32, w: F32) -> float:
    """The largest error, over the largest number of the 32 that a format may scale together."""
    if stored.shape != w.shape:
        return float("inf")
    width = _AROUND if w.shape[1] % _AROUND == 0 else w.shape[1]
    rows = w.reshape(-1, width)
    off = np.abs(stored.reshape(-1, width) - rows)
    return float(np.max(off / np.maximum(np.abs(rows).max(1, keepdims=True), np.finfo(np.float32).tiny)))


# tokenizers ---------------------------------------------------------------------------------------


def fields_of_gguf(path: Path) -> Fields:
    """The tokenizer of the GGUF file ``path``, as it is."""
    found = [
        (field.name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for field in gguf.GGUFReader(path).fields.values()
        if field.name.startswith("tokenizer.")
    ]
    if not found:
        raise InputError(f"{path} has no tokenizer.")
    return found


def fields_of(tokenizer: Any, vocabulary: int) -> Fields:
    """The fields of a fast ``tokenizer`` of transformers, for a model with that many rows of embeddings.

    Raises :class:`InputError` for one that llama.cpp does not have.
    """
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    model = said["model"]
    if model.get("type") != "BPE":
        raise InputError(
            f"llama.cpp has no tokenizer of the kind {model.get('type')}: --to gguf takes byte-pair encodings."
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, types = _tokens(said, vocabulary)
    own: list[tuple[str, Any]]
    if model.get("byte_fallback"):
        # llama.cpp merges the pair whose token has the highest score, so that of each is how early it is merged.
        rank: dict[str, int] = {}
        for number, merge in enumerate(merges):
            rank.setdefault(merge.replace(" ", ""), number)
        kinds = zip(tokens, types, strict=True)
        scores = [
            -float(rank.get(token, len(merges))) if kind == Token.NORMAL else 0.0 for token, kind in kinds
        ]
        spaces = any(
            one.get("prepend") == _SPACE or one.get("prepend_scheme") in ("first", "always")
            for one in _parts(said, "normalizer", "pre_tokenizer")
        )
        own = [("ggml.model", "llama"), ("ggml.scores", scores), ("ggml.add_space_prefix", spaces)]
    else:
        own = [("ggml.model", "gpt2"), ("ggml.pre", _pre_tokenizer(said)), ("ggml.merges", merges)]
    own += [("ggml.tokens", tokens), ("ggml.token_type", types)]
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            own.append((f"ggml.{key}_token_id", int(number)))
    ids = tokenizer("a").input_ids
    own.append(("ggml.add_bos_token", ids[0] == tokenizer.bos_token_id))
    own.append(("ggml.add_eos_token", ids[-1] == tokenizer.eos_token_id))
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        own.append(("chat_template", template))
    return [(f"tokenizer.{key}", value, *_types(value)) for key, value in own]


def _types(value: Any) -> tuple[Type, Type | None]:
    """The type of a field, and that of its elements."""
    if isinstance(value, list):
        element = value[0] if value else ""
        return Type.ARRAY, Type.INT32 if type(element) is int else _types(element)[0]
    return _TYPES[type(value)], None


def _tokens(said: Mapping[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and its type; rows of the embedding without a token are unused."""
    model = said["model"]
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    types = [int(Token.UNUSED)] * vocabulary
    for text, number in model["vocab"].items():
        byte = model.get("byte_fallback") and _BYTE.fullmatch(text)
        tokens[number], types[number] = text, int(Token.BYTE if byte else Token.NORMAL)
    for added in said["added_tokens"]:
        text, number = added["content"], added["id"]
        kind = Token.CONTROL if added["special"] else Token.USER_DEFINED
        tokens[number], types[number] = text, int(Token.UNKNOWN if text == model.get("unk_token") else kind)
    return tokens, types


def _parts(said: Mapping[str, Any], *names: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a tokenizer's normalizer and the like, those of a sequence one by one."""
    for name in names:
        step = said.get(name) or {}
        yield from step.get("normalizers") or step.get("pretokenizers") or ([step] if step else [])


def _pre_tokenizer(said: Mapping[str, Any]) -> str:
    """llama.cpp's name of the rules by which a text is split."""
    splits = []
    for part in _parts(said, "pre_tokenizer"):
        if part["type"] == "Split":
            splits.append(part["pattern"].get("Regex", ""))
        elif part["type"] == "Digits" and part.get("individual_digits"):
            splits.append("digits")
        elif part["type"] == "ByteLevel" and not part.get("add_prefix_space"):
            splits += ["gpt-2"] if part.get("use_regex") else []
        else:
            splits.append(part["type"])
    for name, known in read_table(Path(__file__).parent / "pre_tokenizers.toml").items():
        if known["splits"] == splits:
            return name
    raise InputError(
        "This tokenizer splits a text by rules that --to gguf does not know "
        f"({'; '.join(splits)[:200] or 'none'}): convert from a GGUF file of the model, which names them."
    )
