"""Tiny models made on the spot, with their tokenizers: decoders, and encoders with text and images to read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tiny_types import scale_up


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


def _byte_level(special: dict[str, int]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)} | special, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save_tokenizer(target: Path) -> None:
    """A byte-level tokenizer of 258 tokens in ``target``."""
    tokenizer = _byte_level({"<s>": 256, "</s>": 257})
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


# encoders -----------------------------------------------------------------------------------------

LAYERS, WIDTH, HEADS, VOCAB, POSITIONS = 4, 48, 4, 264, 96
PAD, CLS, SEP, MASK = 256, 257, 258, 259
_TEXT = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "pad_token_id": PAD, "type_vocab_size": 2}
_VISION = {"image_size": 32, "patch_size": 8, "num_channels": 3}
IMAGE_TOKENS = 17


def build_encoder(target: Path, model_type: str, model_class: str, seed: int = 0, **fields: Any) -> Path:
    """Save a random ``model_class`` of ``model_type`` in ``target``; ``fields`` are configuration fields."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    config = AutoConfig.for_model(model_type, **{**sizes, **fields})
    model = getattr(transformers, model_class)(config)
    scale_up(model, 0.2)
    model.save_pretrained(target)
    return target


def text_encoder(
    target: Path, model_type: str = "bert", model_class: str = "BertModel", **fields: Any
) -> Path:
    """A text encoder and its tokenizer."""
    build_encoder(target, model_type, model_class, **{**_TEXT, **fields})
    save_framing(target)
    return target


def vision_encoder(
    target: Path, model_type: str = "vit", model_class: str = "ViTModel", **fields: Any
) -> Path:
    """A vision encoder and its image processor."""
    build_encoder(target, model_type, model_class, **{**_VISION, **fields})
    half = [0.5, 0.5, 0.5]
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": half,
        "image_std": half,
    }
    (target / "preprocessor_config.json").write_text(json.dumps(processor))
    return target


def save_framing(target: Path) -> None:
    """A byte-level tokenizer that frames a text as [CLS] … [SEP]."""
    tokenizer = _byte_level({"[PAD]": PAD, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK})
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(target)


def as_sentence_transformer(folder: Path, mode: str = "mean_tokens", normalize: bool = True) -> Path:
    """Add what sentence-transformers keeps beside a model."""
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), *([("Normalize", "2_Normalize")] * normalize)]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = dict.fromkeys(("cls_token", "mean_tokens", "max_tokens"), False) | {mode: True}
    config = {"word_embedding_dimension": WIDTH, **{f"pooling_mode_{m}": on for m, on in modes.items()}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


def write_text(path: Path, documents: int = 120) -> Path:
    """Documents of random words, one a line of JSON."""
    generator = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(generator.choice(letters, generator.integers(2, 9))) for _ in range(60)]
    lines = [
        json.dumps({"text": " ".join(generator.choice(words, generator.integers(8, 24)))})
        for _ in range(documents)
    ]
    path.write_text("\n".join(lines))
    return path


def write_images(folder: Path, count: int = 40) -> Path:
    """Random images of different sizes, in the formats that there are."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    for i in range(count):
        height, width = generator.integers(20, 60, 2)
        coarse = generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)))
        image.save(folder / f"{i:03}.{('png', 'jpg', 'webp')[i % 3]}")
    return folder
