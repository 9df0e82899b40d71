"""Processors of the tiny multimodal models, pictures, sounds, and documents with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from nbl_export.models.media_tokens import MediaTokens

_SIZE = {"height": 28, "width": 28}


@dataclass(frozen=True)
class Row:
    """A processor of transformers: its special tokens by number, its parts, its fields, and its libraries.

    ``named`` are tokens that its tokenizer knows by a name; ``image`` and ``sound`` are their places in a text.
    """

    kind: str
    special: Mapping[int, str]
    parts: Mapping[str, tuple[str, Mapping[str, Any]]]
    image: str = ""
    sound: str = ""
    named: Mapping[str, int] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    needs: str = "torchvision"


_QWEN_TOKENS = {250: "<|image_pad|>", 251: "<|video_pad|>", 252: "<|vision_start|>", 253: "<|vision_end|>"}
_QWEN_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen(kind: str, patch_size: int, videos: str) -> Row:
    size = {"shortest_edge": 4 * patch_size**2, "longest_edge": 64 * patch_size**2}
    images = {"size": size, "patch_size": patch_size}
    parts = {"image_processor": ("Qwen2VLImageProcessor", images), "video_processor": (videos, {})}
    return Row(kind, _QWEN_TOKENS, parts, _QWEN_PLACE)


_CLIP = ("CLIPImageProcessor", {"size": {"shortest_edge": 28}, "crop_size": _SIZE})
_LLAVA = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_GEMMA = {
    "image_token": 250,
    "audio_token": 251,
    "boi_token": 246,
    "eoi_token": 247,
    "boa_token": 248,
    "eoa_token": 249,
}
_GEMMA_SPECIAL = {
    246: "<|image>",
    247: "<image|>",
    248: "<|audio>",
    249: "<audio|>",
    250: "<|image|>",
    251: "<|audio|>",
    252: "<|video|>",
}
PROCESSORS = {
    "llava": Row(
        "LlavaProcessor",
        {250: "<image>"},
        {"image_processor": _CLIP},
        "<image>",
        named={"image_token": 250},
        fields=_LLAVA,
        needs="",
    ),
    "gemma3": Row(
        "Gemma3Processor",
        {250: "<image_soft_token>", 251: "<start_of_image>", 252: "<end_of_image>"},
        {"image_processor": ("Gemma3ImageProcessor", {"size": _SIZE})},
        "<start_of_image>",
        named={"image_token": 250, "boi_token": 251, "eoi_token": 252},
        fields={"image_seq_length": 4},
        needs="",
    ),
    "gemma3n": Row(
        "Gemma3nProcessor",
        # The ends of images and sounds, and their places, are beyond the words, in tables of the towers.
        {
            246: "<|image>",
            248: "<|audio>",
            260: "<image|>",
            261: "<|image|>",
            268: "<audio|>",
            269: "<|audio|>",
        },
        {
            "image_processor": ("SiglipImageProcessor", {"size": _SIZE}),
            "feature_extractor": ("Gemma3nAudioFeatureExtractor", {}),
        },
        "<|image|>",
        "<|audio|>",
        {**_GEMMA, "eoi_token": 260, "image_token": 261, "eoa_token": 268, "audio_token": 269},
        {"image_seq_length": 4, "audio_seq_length": 12},
        needs="",
    ),
    "gemma4": Row(
        "Gemma4Processor",
        _GEMMA_SPECIAL,
        {
            "image_processor": (
                "Gemma4ImageProcessor",
                {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 3},
            ),
            "feature_extractor": ("Gemma4AudioFeatureExtractor", {"feature_size": 16}),
            "video_processor": ("Gemma4VideoProcessor", {}),
        },
        "<|image|>",
        "<|audio|>",
        _GEMMA,
    ),
    "qwen2-vl": _qwen("Qwen2VLProcessor", 14, "Qwen2VLVideoProcessor"),
    "qwen2.5-vl": _qwen("Qwen2_5_VLProcessor", 14, "Qwen2VLVideoProcessor"),
    "qwen3-vl": _qwen("Qwen3VLProcessor", 16, "Qwen3VLVideoProcessor"),
    "qwen2-audio": Row(
        "Qwen2AudioProcessor",
        {250: "<|AUDIO|>", 251: "<|audio_bos|>", 252: "<|audio_eos|>"},
        {"feature_extractor": ("WhisperFeatureExtractor", {"feature_size": 16, "chunk_length": 1})},
        sound="<|audio_bos|><|AUDIO|><|audio_eos|>",
        needs="",
    ),
    "phi4-multimodal": Row(
        "Phi4MultimodalProcessor",
        {250: "<|image|>", 251: "<|audio|>"},
        {
            # Of the true size, which its numbers of tokens are for.
            "image_processor": ("Phi4MultimodalImageProcessor", {"dynamic_hd": 1}),
            "audio_processor": ("Phi4MultimodalFeatureExtractor", {}),
        },
        "<|image|>",
        "<|audio|>",
        {"image_token": 250, "audio_token": 251},
    ),
    "llama4": Row(
        "Llama4Processor",
        {
            250: "<|patch|>",
            251: "<|image|>",
            252: "<|image_start|>",
            253: "<|image_end|>",
            254: "<|tile_x_separator|>",
            255: "<|tile_y_separator|>",
        },
        {"image_processor": ("Llama4ImageProcessor", {"size": _SIZE, "max_patches": 4})},
        "<|image|>",
    ),
    "mistral3": Row(
        "PixtralProcessor",
        {250: "[IMG]", 251: "[IMG_BREAK]", 252: "[IMG_END]"},
        {"image_processor": ("PixtralImageProcessor", {"size": {"longest_edge": 84}, "patch_size": 14})},
        "[IMG]",
        fields={"patch_size": 14, "spatial_merge_size": 2},
    ),
    "llava-next": Row(
        "LlavaNextProcessor",
        {250: "<image>"},
        {
            "image_processor": (
                "LlavaNextImageProcessor",
                {
                    "size": {"shortest_edge": 28},
                    "crop_size": _SIZE,
                    "image_grid_pinpoints": [[28, 28], [28, 56]],
                },
            )
        },
        "<image>",
        fields=_LLAVA,
    ),
    "idefics3": Row(
        "Idefics3Processor",
        {
            250: "<image>",
            251: "<fake_token_around_image>",
            252: "<end_of_utterance>",
            253: "<global-img>",
            **{240 + 3 * row + col: f"<row_{row + 1}_col_{col + 1}>" for row in range(3) for col in range(3)},
        },
        {
            "image_processor": (
                "Idefics3ImageProcessor",
                {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}},
            )
        },
        "<image>",
        fields={"image_seq_len": 1},
    ),
    "internvl": Row(
        "InternVLProcessor",
        {250: "<IMG_CONTEXT>", 251: "<img>", 252: "</img>", 253: "<video>"},
        {
            "image_processor": ("GotOcr2ImageProcessor", {"size": _SIZE, "max_patches": 2}),
            "video_processor": ("InternVLVideoProcessor", {}),
        },
        "<IMG_CONTEXT>",
        named={
            "context_image_token": 250,
            "start_image_token": 251,
            "end_image_token": 252,
            "video_token": 253,
        },
        fields={"image_seq_length": 1},
    ),
    "glm4v": Row(
        "Glm4vProcessor",
        {
            250: "<|image|>",
            251: "<|video|>",
            252: "<|begin_of_image|>",
            253: "<|end_of_image|>",
            254: "<|begin_of_video|>",
            255: "<|end_of_video|>",
        },
        {
            "image_processor": (
                "Glm4vImageProcessor",
                {"size": {"shortest_edge": 28 * 28, "longest_edge": 112 * 112 * 2}, "patch_size": 14},
            ),
            "video_processor": ("Glm4vVideoProcessor", {}),
        },
        "<|begin_of_image|><|image|><|end_of_image|>",
    ),
}
_GEMMA3N = PROCESSORS["gemma3n"]
PROCESSORS["gemma3n-timm"] = replace(
    _GEMMA3N,
    parts={
        **_GEMMA3N.parts,
        "image_processor": ("SiglipImageProcessor", {"size": {"height": 64, "width": 64}}),
    },
    needs="timm",
)
PLACE = {name: row.image for name, row in PROCESSORS.items()}


def skip_without(name: str) -> None:
    """Skip the test if a library is not there that the processor of the model ``name`` needs."""
    row = PROCESSORS[name]
    if row.needs:
        pytest.importorskip(row.needs, reason=f"{row.kind} needs {row.needs}")


def save_processor(name: str, target: Path) -> Path:
    """The processor of the model ``name``, of which the tokenizer has its special tokens, in ``target``."""
    skip_without(name)
    row = PROCESSORS[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {row.special.get(i, c): i for i, c in enumerate(alphabet)} | {"<s>": 256, "</s>": 257}
    vocab |= {f"<{i}>": i for i in range(258, max(row.special)) if i not in row.special}
    vocab |= {token: i for i, token in row.special.items()}
    made = Tokenizer(BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in row.special.values()])
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens={called: row.special[i] for called, i in row.named.items()},
    )
    parts = {part: getattr(transformers, kind)(**fields) for part, (kind, fields) in row.parts.items()}
    processor = getattr(transformers, row.kind)(tokenizer=tokenizer, **parts, **row.fields)
    processor.save_pretrained(target)
    return target


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def save_documents(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A .jsonl of ``rows`` in ``folder``."""
    path = folder / "documents.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def plain_tokens(features: np.ndarray[Any, np.dtype[np.float32]]) -> MediaTokens:
    """The tokens of one image with ``features`` [tokens, d], of which nothing else is known."""
    one = np.ones(len(features), np.int32)
    later = np.zeros((len(features), 0, features.shape[1]), np.float32)
    return MediaTokens(features, later, one[:, None] * 0, one, one * 0, one * 0, one[:1] * 0)
