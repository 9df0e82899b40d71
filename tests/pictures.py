"""Processors of the tiny multimodal models, pictures, and documents with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from nbl_export.models.towers import load_processor as own_processor

# What each model calls the place of an image in a text.
PLACE = {
    "llava": "<image>",
    "gemma3": "<start_of_image>",
    "qwen2.5-vl": "<|vision_start|><|image_pad|><|vision_end|>",
}
_SPECIAL = {
    "llava": {250: "<image>"},
    "gemma3": {250: "<image_soft_token>", 251: "<start_of_image>", 252: "<end_of_image>"},
    "qwen2.5-vl": {
        250: "<|image_pad|>",
        251: "<|video_pad|>",
        252: "<|vision_start|>",
        253: "<|vision_end|>",
    },
}


def save_processor(name: str, target: Path) -> Path:
    """The processor of the model ``name``, of which the tokenizer has its special tokens, in ``target``."""
    special = _SPECIAL[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {special.get(i, c): i for i, c in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    made = Tokenizer(BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in special.values()])
    named = {}
    if name == "gemma3":
        named = {"image_token": special[250], "boi_token": special[251], "eoi_token": special[252]}
    elif name == "llava":
        named = {"image_token": special[250]}
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", extra_special_tokens=named
    )
    size = {"height": 28, "width": 28}
    processor: Any
    if name == "llava":
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size)
        processor = transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    elif name == "gemma3":
        images = transformers.Gemma3ImageProcessor(size=size)
        processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    else:
        processor = tokenizer
    processor.save_pretrained(target)
    return target


class QwenProcessor:
    """As transformers' own for text and images, which is not made without torchvision, for the sake of videos."""

    def __init__(self, folder: Path, patch_size: int = 14) -> None:
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.image_processor: Any = transformers.Qwen2VLImageProcessor(
            size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}, patch_size=patch_size
        )

    def __call__(self, text: list[str], images: list[list[Any]], **_options: Any) -> dict[str, torch.Tensor]:
        found = self.image_processor(images=images[0], return_tensors="pt")
        parts = text[0].split("<|image_pad|>")
        if len(parts) != len(images[0]) + 1:
            raise ValueError("the numbers of placeholders and of images differ")
        tokens = [int(grid.prod()) // 4 for grid in found["image_grid_thw"]]
        whole = parts[0] + "".join(
            "<|image_pad|>" * n + part for n, part in zip(tokens, parts[1:], strict=True)
        )
        ids = self.tokenizer(whole, add_special_tokens=False, return_tensors="pt")
        return {**ids, **found, "mm_token_type_ids": (ids["input_ids"] == 250).int()}


def load_processor(source: Any) -> Any:
    """The processor of the model in a folder, in the place of that of :mod:`nbl_export.models.towers`."""
    config = json.loads((Path(source.path) / "config.json").read_text())
    return QwenProcessor(Path(source.path)) if "qwen" in config["model_type"] else own_processor(source)


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def save_documents(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A .jsonl of ``rows`` in ``folder``."""
    path = folder / "documents.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path
