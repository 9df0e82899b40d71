"""Small models with their tokenizers, as folders: a random tiny Llama, and stories260K."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def build(target: Path, seed: int = 0, **changes: Any) -> Path:
    """Save the model and tokenizer in ``target``; ``changes`` are configuration fields."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        **changes,
    }
    model = LlamaForCausalLM(LlamaConfig(**fields))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(8 if "self_attn" in name else 4)
    model.save_pretrained(target)
    save_tokenizer(target)
    return target


def save_tokenizer(target: Path) -> None:
    """A byte-level tokenizer of 258 tokens in ``target``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        target
    )


def build_stories(source: Path, target: Path) -> Path:
    """Convert ``source`` (stories260K.bin and tok512.bin) into the folder ``target``."""
    raw = (source / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, kv_heads, vocab, positions = struct.unpack_from("<7i", raw)
    flat = np.frombuffer(raw, dtype="<f4", offset=28)
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return torch.from_numpy(flat[at - size : at].reshape(shape).copy())

    head = dim // heads
    kv = kv_heads * head
    embedding = take(vocab, dim)
    stacked = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv, dim),
        "self_attn.v_proj": take(layers, kv, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }

    def half_split(weight: torch.Tensor, count: int) -> torch.Tensor:
        return weight.view(layers, count, head // 2, 2, dim).transpose(2, 3).reshape(layers, -1, dim)

    stacked["self_attn.q_proj"] = half_split(stacked["self_attn.q_proj"], heads)
    stacked["self_attn.k_proj"] = half_split(stacked["self_attn.k_proj"], kv_heads)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    state = {
        f"model.layers.{i}.{name}.weight": weight[i]
        for name, weight in stacked.items()
        for i in range(layers)
    }
    state |= {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": take(dim),
        "lm_head.weight": embedding,
    }
    model.load_state_dict(state)
    model.save_pretrained(target)
    _tokenizer(source / "tok512.bin", vocab).save_pretrained(target)
    return target


def _tokenizer(path: Path, count: int) -> PreTrainedTokenizerFast:
    raw = path.read_bytes()
    at, pieces = 4, []
    for _ in range(count):
        _score, length = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + length].decode("utf-8", errors="replace").replace(" ", "▁"))
        at += 8 + length
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    pieces[3:259] = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
