"""A random tiny Llama with a tokenizer that needs no training: for tests that need a model, not a good one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
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
