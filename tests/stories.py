"""stories260K as a Hugging Face folder: a real 1 MB Llama with grouped-query attention.

The file has llama2.c's layout: a header of seven int32, then float32 tensors. Its rotary embedding
rotates neighbouring pairs; transformers rotates halves, so the rows of q and k are permuted.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def build(source: Path, target: Path) -> Path:
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
