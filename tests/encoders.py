"""Tiny random encoders whose attention matters, with a tokenizer, text, and images to calibrate them on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoConfig, PreTrainedTokenizerFast

from tests.tiny_types import scale_up

LAYERS, WIDTH, HEADS, VOCAB, POSITIONS = 4, 48, 4, 264, 96
PAD, CLS, SEP, MASK = 256, 257, 258, 259
_TEXT = {"vocab_size": VOCAB, "max_position_embeddings": POSITIONS, "pad_token_id": PAD, "type_vocab_size": 2}
_VISION = {"image_size": 32, "patch_size": 8, "num_channels": 3}
IMAGE_TOKENS = 17


def build(target: Path, model_type: str, model_class: str, seed: int = 0, **fields: Any) -> Path:
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
    build(target, model_type, model_class, **{**_TEXT, **fields})
    save_tokenizer(target)
    return target


def vision_encoder(
    target: Path, model_type: str = "vit", model_class: str = "ViTModel", **fields: Any
) -> Path:
    """A vision encoder and its image processor."""
    build(target, model_type, model_class, **{**_VISION, **fields})
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


def save_tokenizer(target: Path) -> None:
    """A byte-level tokenizer that frames a text as [CLS] … [SEP]."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"[PAD]": PAD, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK}
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)} | special, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
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
