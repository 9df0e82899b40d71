"""Write the files next to a graph: its configurations, updated after the rewrite, and its tokenizer.

``genai_config.json`` has only keys that onnxruntime-genai knows, since unknown keys are rejected. ``num_hidden_layers``
is the number of KV pairs, which are numbered contiguously: releases before 0.13 loop over it, later ones read
the graph.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbl_export.batch import EMBEDDINGS, PER_LAYER, PIXELS, TOKENS
from nbl_export.errors import InputError
from nbl_export.files import atomic_path, json_text, read_json, stays_in, write_text
from nbl_export.graph.embedding import FEATURES
from nbl_export.graph.embedding import NAME as EMBEDDING

if TYPE_CHECKING:
    from nbl_export.models.dummy_run import BlockCache

CONFIG, GENAI = "config.json", "genai_config.json"
# Weights of other formats; a rewritten folder does not need them.
_FULL = "full_attention"  # in layer_types of genai_config.json
_NOT_COPIED = {".onnx", ".data", ".onnx_data", ".safetensors", ".bin", ".gguf", ".pt", ".pth", ".engine"}


def copy_sidecars(
    files: Iterable[Path],
    folder: Path,
    linear: Iterable[int],
    cached: Iterable[int],
    root: Path | None = None,
) -> list[Path]:
    """Write ``files`` into ``folder``, with updated configurations; returns the written files.

    ``linear`` layers have no KV cache, ``cached`` layers do. Files in subfolders of ``root``, as for the pooling of
    sentence-transformers, stay unchanged and keep their subfolder. Raises :class:`InputError` for an invalid
    configuration.
    """
    linear_layers, kv_layers, written = list(linear), list(cached), []
    for source in files:
        own = source.relative_to(root) if root else Path(source.name)
        written.append(folder / own)
        if str(own) in (GENAI, CONFIG):
            config = _updated(source, linear_layers, kv_layers)
            write_text(written[-1], json_text(config, finite=False))
        elif source.resolve() != written[-1].resolve():
            with atomic_path(written[-1]) as temporary:
                shutil.copyfile(source, temporary)
    return written


def _updated(source: Path, linear: list[int], cached: list[int]) -> dict[str, Any]:
    config = read_json(source, "The configuration of the graph", "export the model again")
    try:
        told = {"nbl_export": {"linearized_layers": linear, "kv_layers": cached}}
        return _genai(config, cached) if source.name == GENAI else {**config, **told}
    except (AttributeError, KeyError, TypeError, IndexError):
        raise InputError(
            f"{source} is not a valid {source.name} of a decoder: export the model again."
        ) from None


def _genai(config: dict[str, Any], cached: list[int]) -> dict[str, Any]:
    decoder = config["model"]["decoder"]
    if kinds := decoder.get("layer_types"):  # of the layers that keep something: keys and values, or a state
        if kinds.count(_FULL) != len(cached):
            kinds = [kind for layer, kind in enumerate(kinds) if kind != _FULL or layer in cached]
            decoder |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    elif decoder["num_hidden_layers"] != len(cached):  # not updated yet
        # Releases before 0.13 loop over this number of KV pairs; later ones read the graph.
        decoder["num_hidden_layers"] = len(cached)
        window = decoder.get("sliding_window")
        if window and window.get("layers") is not None:  # layers are KV pair numbers, which have changed
            window["layers"] = [new for new, old in enumerate(cached) if old in window["layers"]]
    return config


def sidecars_of(graph: Path, data: Iterable[Path]) -> list[Path]:
    """The files in the folder of ``graph`` that belong to it: configurations and tokenizer, no weights.

    Raises :class:`InputError` for a link that points outside the folder; it is not followed.
    """
    own = {graph.name, *(path.name for path in data)}
    files = [p for p in sorted(graph.parent.iterdir()) if p.is_file() and not p.name.startswith(".")]
    files = [p for p in files if p.name not in own and not _NOT_COPIED & set(p.suffixes)]
    for path in files:
        if not stays_in(graph.parent.resolve(), path.resolve()):
            raise InputError(
                f"{path} is a link that leaves its folder, so it is not followed: remove it, or copy the file there."
            )
    return files


def graph_in(path: Path) -> Path:
    """The decoder's ONNX file: ``path`` itself, or the one in the folder ``path``.

    Raises :class:`InputError` if there is none, or if there are several and neither the configuration nor the usual
    file name decides.
    """
    if not path.is_dir():
        return path
    if (path / GENAI).is_file():
        config = read_json(path / GENAI, "The configuration of the graph", "export the model again")
        try:
            name = str(config["model"]["decoder"]["filename"])
        except (KeyError, TypeError):
            raise InputError(f"{path / GENAI} names no decoder: give the .onnx file itself.") from None
        if Path(name).name != name:
            raise InputError(
                f"{path / GENAI} names a decoder outside its folder ({name}), which is not read: give the .onnx "
                "file itself."
            )
        return path / name
    graphs = sorted(path.glob("*.onnx"))
    chosen = [g for g in graphs if g.name == "model.onnx"] or graphs
    if len(chosen) != 1:
        found = ", ".join(g.name for g in graphs) or "none"
        raise InputError(
            f"The folder {path} has no single .onnx file (found: {found}): name the file itself."
        )
    return chosen[0]


# genai_config.json --------------------------------------------------------------------------------


def genai_config(
    config: Any, kv_pairs: int, kv_heads: int, head_size: int, shared: bool = False, generation: Any = None
) -> dict[str, Any]:
    """The configuration for a decoder graph with the standard names and ``kv_pairs`` cached layers.

    ``config`` is the model's (text) configuration and ``generation`` its generation_config, if it has one: chat models
    name the end of a turn there alone. ``shared`` means that past and present may share one buffer.
    """
    ends = _tokens((config, generation), "eos_token_id")
    first_end = ends[0] if ends else 0
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 2048
    names = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    return {
        "model": {
            "bos_token_id": [*_tokens((config, generation), "bos_token_id"), first_end][0],
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": head_size,
                "hidden_size": config.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": names["key"],
                    "past_value_names": names["value"],
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": kv_pairs,
                "num_key_value_heads": kv_heads,
            },
            "eos_token_id": ends if len(ends) > 1 else first_end,
            "pad_token_id": [*_tokens((config, generation), "pad_token_id"), first_end][0],
            "type": config.model_type,
            "vocab_size": config.vocab_size,
        },
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": shared},
    }


def with_states(config: dict[str, Any], blocks: Sequence[BlockCache]) -> dict[str, Any] | None:
    """``config`` of a decoder whose ``blocks`` keep states beside keys and values; None if genai cannot hold them.

    It finds the layers of a state by the names of the graph's inputs. Convolutions without another state are held for
    one architecture alone, LFM2, which has the kind of every layer in its configuration.
    """
    kinds = {tuple(state.kind for state in block.states) for block in blocks if block.states}
    if not kinds:
        return config
    if kinds not in ({("conv",)}, {("conv", "recurrent")}):
        return None
    decoder = dict(config["model"]["decoder"])
    for side, ends in (("past", "inputs"), ("present", "outputs")):
        names = {f"{side}_{kind}_names": f"{side}.%d.{kind}" for kind in next(iter(kinds))}
        decoder[ends] = decoder[ends] | names
    model = config["model"] | {"type": "decoder"}
    if kinds == {("conv",)}:
        decoder["layer_types"] = ["full_attention" if block.kv else "conv" for block in blocks]
        decoder["num_hidden_layers"] = len(blocks)
        model["type"] = "lfm2"
    return {**config, "model": model | {"decoder": decoder}}


# Of the towers, which the user puts beside the graph, what onnxruntime-genai reads in genai_config.json.
VISION, SPEECH = "vision.onnx", "speech.onnx"
# Types that it has another name for, where it does the same for both.
_CALLED = {"phi4_multimodal": "phi4mm", "qwen2_vl": "qwen2_5_vl"}
_OF_MODEL = ("image_token_id", "video_token_id", "vision_start_token_id")
_OF_VISION = ("spatial_merge_size", "patch_size", "tokens_per_second")


def with_embeds(
    config: dict[str, Any],
    whole: Any,
    placeholders: Collection[str],
    position_rows: int,
    per_layer: bool = False,
) -> dict[str, Any]:
    """``config`` of a decoder that reads embeddings, with its embedding and a place for the user's towers.

    ``whole`` is the configuration of the model with all its towers, None if it has none; ``placeholders`` name what the
    embedding puts among the tokens, as in :data:`FEATURES`; ``per_layer``: it makes embeddings of each layer, too.
    """
    made = {name: name for name in (EMBEDDINGS, *[PER_LAYER] * per_layer)}
    decoder = config["model"]["decoder"]
    inputs = {name: given for name, given in decoder["inputs"].items() if name != TOKENS}
    embedding = {
        "filename": EMBEDDING,
        "inputs": {TOKENS: TOKENS, **{FEATURES[kind]: FEATURES[kind] for kind in placeholders}},
        "outputs": made,
    }
    model = config["model"] | {
        "decoder": decoder | {"inputs": {EMBEDDINGS: EMBEDDINGS, **inputs, **made}},
        "embedding": embedding,
    }
    if whole is not None:
        kind = str(whole.model_type)
        model |= {"type": _CALLED.get(kind, kind), **_numbers(_OF_MODEL, whole)}
    if "image" in placeholders:
        sizes = "image_grid_thw" if position_rows > 1 else "image_sizes"
        model["vision"] = {
            "filename": VISION,
            "inputs": {PIXELS: PIXELS, sizes: sizes},
            "outputs": {FEATURES["image"]: FEATURES["image"]},
            **_numbers(_OF_VISION, whole, getattr(whole, "vision_config", None)),
        }
    if "audio" in placeholders:
        model["speech"] = {"filename": SPEECH, "outputs": {FEATURES["audio"]: FEATURES["audio"]}}
    return {**config, "model": model}


def _numbers(names: Iterable[str], *configs: Any) -> dict[str, Any]:
    """Those of ``names`` that are numbers in the first of ``configs`` that has them."""
    values = {name: [getattr(config, name, None) for config in configs] for name in names}
    numbers = {name: [v for v in found if isinstance(v, int | float)] for name, found in values.items()}
    return {name: found[0] for name, found in numbers.items() if found}


def _tokens(configs: tuple[Any, ...], name: str) -> list[int]:
    """The token ids that the ``configs`` call ``name``, each once, in their order."""
    found: dict[int, None] = {}
    for config in configs:
        ids = getattr(config, name, None)
        for token in ids if isinstance(ids, (list, tuple)) else (ids,):
            if isinstance(token, int) and token >= 0:  # some say -1 for none
                found[token] = None
    return list(found)
