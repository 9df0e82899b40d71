"""Compute what each stage of a run takes: room on the disk, and memory that cannot be dropped.

Only the model's configuration and the headers of its weights are read. Weights and moments are exact; configurations,
reports and the like are not counted. A checkpoint that is mapped takes no memory, since its pages are read again when
others need the room. docs/large-models.md holds the memory to what was measured.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from nbl_export.batch import PIXELS
from nbl_export.blocks import ATTENTION, MLP, SPAN, spans_of
from nbl_export.calibrate.moments import file_bytes
from nbl_export.errors import InputError
from nbl_export.models.candidates import shared_without_numbers
from nbl_export.models.layers import (
    attention_layers,
    block_stack,
    hidden_size,
    image_shape,
    main_input,
    mlp_modules,
)
from nbl_export.models.lengths import crossed_by, crossing_prompts
from nbl_export.models.source import ModelSource
from nbl_export.models.stored import load_skeleton, stored_dtype
from nbl_export.settings import RunSettings, choices
from nbl_export.settings.definition import bytes_of
from nbl_export.workspace import Workspace

MIB, GIB = 1 << 20, 1 << 30
# Bytes of a weight in a graph; quantized ones with their scales. Their embedding stays float32.
WEIGHT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.25, "int4": 0.75}
_F64, _F32 = 8, 4
# Rows of the probe have about so many tokens in all; each layer has u and y of them, and the residual stream.
_PROBE_TOKENS = 40
# The weights of a part of a graph that is run in parts, but for a larger one.
_PART = 128 << 20
# Measured: Python with torch; with a model of transformers; with the exporter or onnxruntime.
_TORCH, _PROGRAM, _PROGRAM_ONNX = 200 * MIB, 300 * MIB, 600 * MIB
# Weights that are used many times stay in memory up to this; states of the next set are kept up to that.
_KEPT, _NEXT = 2 * GIB, 512 * MIB
# Tokens of a forward pass while moments are collected; documents and tokens of one while text is sampled.
_BATCH, _SAMPLED, _SAMPLE_LENGTH = 1024, 256, 128
# As many as are decoded across a length by default.
_STEPS = 8
_PATCH = 16  # of images, for a model that does not say


@dataclass(frozen=True)
class Sizes:
    """A model, as far as needs depend on it. Weights are counted, those of the ``embedding`` are among all.

    ``layers`` and ``mlps`` can become linear. ``block`` are the weights of the largest block, ``head`` those of the
    language-model head, ``largest`` those of the largest matrix, ``stack`` those of the largest one of all experts of a
    block, ``inner`` is the widest activation in a block, ``cache`` the numbers that a token adds to the KV cache. A
    weight has ``stored`` bytes in its file, 0 if it is dequantized when it is read. ``longest`` is the longest text
    that crosses a length of the model, ``scores`` the numbers of an attention layer's scores on it. ``image`` are the
    numbers and the tokens of an image, if it reads these.
    """

    weights: int
    embedding: int
    width: int
    layers: int
    mlps: int = 0
    block: int = 0
    head: int = 0
    largest: int = 0
    stack: int = 0
    inner: int = 0
    cache: int = 0
    stored: int = 0
    longest: int = 0
    scores: int = 0
    image: tuple[int, int] | None = None

    def blocks(self, parts: Sequence[str]) -> int:
        """How many attentions, MLPs and spans of these ``parts`` can become linear."""
        spans = len(spans_of(range(min(self.layers, self.mlps))))
        of = {ATTENTION: self.layers, MLP: self.mlps, SPAN: spans}
        return sum(of[part] for part in parts)

    def kept(self, width: int) -> int:
        """Bytes of the weights where they are used many times: all of a small model, else a block or the head.

        None if they are mapped as they are.
        """
        used = self.weights if width * self.weights <= _KEPT else max(self.block, self.head)
        return 0 if width == self.stored else width * used


def sizes_of(model: torch.nn.Module, stored: int = 0) -> Sizes:
    """The sizes of ``model``, whose weights may be on the meta device."""
    images = main_input(model) == PIXELS
    shared, layers = shared_without_numbers(model), len(attention_layers(model))
    blocks = list(block_stack(model)[1].children())
    table = None if images else model.get_input_embeddings()  # type: ignore[operator]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads, width = _configured(model, "num_attention_heads"), hidden_size(model)
    kv_heads = _configured(model, "num_key_value_heads") or heads
    head_size = _configured(model, "head_dim") or width // max(1, heads)
    longest = max(crossing_prompts(crossed_by(model, _STEPS)), default=0)
    image = None
    if images:
        shape, patch = image_shape(model), _configured(model, "patch_size") or _PATCH
        image = prod(shape), 1 + prod(side // patch for side in shape[1:])
    return Sizes(
        weights=sum(p.numel() for p in model.parameters()),
        embedding=0 if table is None else table.weight.numel(),
        width=width,
        layers=layers - len(set(shared.values())),
        mlps=sum(not isinstance(found, str) for found in mlp_modules(model).values()),
        block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        head=0 if head is None else head.weight.numel(),
        largest=max(p.numel() for p in model.parameters() if p.ndim > 1),
        stack=max((p.numel() for block in blocks for p in block.parameters() if p.ndim > 2), default=0),
        inner=max(max(p.shape[-2:]) for block in blocks for p in block.parameters() if p.ndim > 1),
        cache=2 * kv_heads * head_size * (layers - len(shared)),
        stored=stored,
        longest=longest,
        scores=longest**2 * (heads or 1),
        image=image,
    )


def _configured(model: torch.nn.Module, key: str) -> int:
    """A number of the configuration, 0 without one; in its JSON even where it has others for each layer."""
    config: Any = model.config
    found = config.get_text_config().to_dict().get(key)
    return found if isinstance(found, int) else 0


def sizes_of_source(source: ModelSource, model: torch.nn.Module | None = None) -> Sizes:
    """The sizes of a model by its configuration and the headers of its files; ``model`` is it without weights."""
    stored = 0
    if not source.gguf_file:
        dtype = stored_dtype(Path(source.path))
        stored = dtype.itemsize if dtype else _F32
    return sizes_of(model or load_skeleton(source), stored)


# disk ---------------------------------------------------------------------------------------------


def order(asked: RunSettings) -> list[str]:
    """The stages of a run; a budget weighs layers with the speed of the graph."""
    made = ["select", "export"]
    if asked.selection.budget or asked.selection.workload:
        made.reverse()
    return ["calibrate", *made, "rewrite", *["build"] * (asked.engines is not None), "verify"]


def disk(sizes: Sizes, asked: RunSettings) -> dict[str, tuple[int, int]]:
    """The bytes that each stage leaves in the output folder, and those that it needs beside them while it works.

    ``asked`` is resolved. What other stages write is small. Calibration leaves rows, moments and probe; beside them are
    two checkpoints, the new one and the old one: the states of all rows. To measure ranges for fp16 the weights of a
    part are there in float32 first.
    """
    chosen, exporting, text = asked.selection, asked.exporting, asked.calibration
    precision = str(exporting.precision)
    width = WEIGHT_BYTES.get(precision, _F32)
    maps, moments = _map_weights(sizes, asked), file_bytes(sizes.width)
    # A span has no tensors of its own.
    probe = _F32 * _PROBE_TOKENS * sizes.width * sizes.blocks([one for one in text.parts if one != SPAN])
    rows = text.samples + text.heldout_samples + text.selection_samples
    row, states = (
        (sizes.image[0] if sizes.image else text.seq_len),
        _F32 * _tokens(sizes, asked) * sizes.width,
    )
    graph = int(sizes.weights * width) + (_F32 * sizes.embedding if precision in ("int8", "int4") else 0)
    ranges = exporting.exported_by == "torch" and precision == "fp16"
    part = ranges * min(_F32 * sizes.weights, max(_F32 * sizes.embedding, _PART))
    fits = max(6 * bool(chosen.repair), int(chosen.budget.min_speedup is not None))
    return {
        "calibrate": (
            rows * _F32 * row + sizes.blocks(text.parts) * moments + 3 * probe,
            2 * (states + 2 * moments),
        ),
        "select": (_F32 * maps + 2 * probe, _F32 * maps * fits),
        "export": (graph, max(0, part - graph)),
        "rewrite": (int(maps * width) + (0 if asked.folder.keeps else graph), 0),
        "build": (2 * graph, 0),
        "verify": (0, 0),
    }


def _tokens(sizes: Sizes, asked: RunSettings) -> int:
    """Those of the text or the images of a calibration."""
    return asked.calibration.samples * (sizes.image[1] if sizes.image else asked.calibration.seq_len)


def _map_weights(sizes: Sizes, asked: RunSettings) -> int:
    """Numbers of W and b of the chosen layers; where K is found out, of half of them."""
    chosen = asked.selection
    k = len(chosen.layers) if chosen.layers is not None else chosen.k
    one = sizes.width * (sizes.width if chosen.rank is None else 2 * chosen.rank) + sizes.width
    return one * (-(-sizes.blocks(asked.calibration.parts) // 2) if k is None else k)


def check_disk(ws: Workspace, sizes: Sizes, asked: RunSettings, stages: Sequence[str]) -> None:
    """Raise :class:`InputError` if the disk has no room for what these stages write, one after the other."""
    there = sum(path.stat().st_size for path in ws.partial_moments.glob("*") if path.is_file())
    free, left, most = shutil.disk_usage(ws.root).free, 0, 0
    for stage in stages:
        leaves, beside = disk(sizes, asked)[stage]
        unfinished = there if stage == "calibrate" else 0
        most = max(most, left + leaves + beside - unfinished)
        left += max(0, leaves - unfinished)
    if most > free:
        what = f"`{stages[0]}`" if len(stages) == 1 else "this run"
        raise InputError(
            f"{ws.root} has {shown(free)} free, and {what} needs about {shown(most)}: free some space, choose another "
            "--output, or ask for a narrower --precision or fewer --samples."
        )


def shown(count: float) -> str:
    """Bytes: 12 MiB, 1.5 GiB."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB / 10 else f"{count / MIB:,.0f} MiB"


# memory -------------------------------------------------------------------------------------------


def memory(sizes: Sizes, asked: RunSettings, width: int, free: int) -> dict[str, Mapping[str, float]]:
    """Named bytes of memory of each stage when it takes the most; the model computes in ``width`` bytes a number.

    ``asked`` is resolved; of the ``free`` bytes calibration takes half for states, unless it is told how much.

    - The sums of a layer are there three times when they are written: as sums, as arrays, and as the bytes of a file.
      A fit has the moments (5 d²) and about nine matrices beside them: covariances, Cholesky factors, what is solved.
    - A loss is measured against the original's predictions (2 bytes a token and vocabulary entry). A search keeps the
      states of the best set and of the one that is measured, where they have room.
    - An export reads the largest matrix in float32; the ranges that fp16 needs are those of the float32 graph.
    - A rewrite has W as it is planned, in float64, and as it is written.
    - A CPU computes in float32: a half-precision head is converted when it is used, and twice where it is transposed.
      A small model's reference stays beside the sessions.
    """
    text, chosen, exporting = asked.calibration, asked.selection, str(asked.exporting.precision)
    d, blocks, vocabulary = sizes.width, sizes.blocks(text.parts), sizes.head // sizes.width
    maps, logits = _F32 * _map_weights(sizes, asked), 3 * _F32 * vocabulary
    states, rows = 2 * width * _tokens(sizes, asked) * d, text.selection_samples * text.seq_len
    limit = free // 2 if text.memory is None else bytes_of(text.memory)
    versions = width * rows * d * blocks
    again = chosen.criterion == "greedy" and width * sizes.weights <= _KEPT and 2 * versions <= _NEXT
    long: Mapping[str, float] = {"logits of a row": logits * max(text.seq_len, sizes.longest)}
    precision, small = WEIGHT_BYTES[exporting], _F32 * sizes.weights <= _KEPT
    reference = {"the reference's weights": sizes.kept(_F32)}
    program, kept = {"the program": _PROGRAM}, {"weights": sizes.kept(width)}
    onnx: Mapping[str, float] = {"the program": _PROGRAM_ONNX}
    scores = _F32 * sizes.scores
    verify = {**onnx, **long, "scores beyond a length": 2 * scores}
    phases: dict[str, Sequence[Mapping[str, float]]] = {
        "calibrate": [
            {
                **program,
                "a block's weights": 0 if width == sizes.stored else width * text.longest * sizes.block,
                # Up, gate and down: as they are merged, and as they are multiplied.
                "the experts of a block": 3 * width * sizes.stack,
                "the moments of a layer": 3 * 5 * _F64 * d * d * text.at_once,
                "states between blocks": states if states <= limit else 0,
                "a batch": _BATCH * (3 * _F64 * d + 4 * width * sizes.inner),
            },
            {
                **program,
                **kept,
                "the KV cache of sampling": _SAMPLED * _SAMPLE_LENGTH * sizes.cache * width,
                "logits of sampling": logits * _SAMPLED,
            },
        ][: 1 + (text.calibration == (choices.SELF,))],
        "select": [
            {
                "the program": _TORCH,
                "the moments of a layer": 5 * _F64 * d * d,
                "the fit of a layer": 9 * _F64 * d * d,
                "W and b of the chosen layers": maps,
            },
            *[
                {
                    **program,
                    **kept,
                    "W and b of every layer": _F32 * blocks * d * d,
                    "the original's predictions": 2 * rows * vocabulary,
                    "logits of a row": logits * text.seq_len,
                    "states of every version": versions * (3 if again else 1),
                }
            ]
            * bool(choices.CRITERIA[str(chosen.criterion)]),
            *[
                {
                    **program,
                    "weights": sizes.kept(_F32),
                    "activations of a step": 16 * _F32 * _BATCH * sizes.inner,
                    "logits of a step": 4 * _F32 * _BATCH * vocabulary,
                    "W and b, and their optimizer": 3 * maps,
                }
            ]
            * bool(chosen.repair),
        ],
        "export": [
            {
                **onnx,
                "the largest weight": (0 if sizes.stored == _F32 else _F32 * sizes.largest)
                + (precision * sizes.largest if precision < _F32 else 0),
            },
            {**onnx, "the largest weight": _F32 * sizes.largest, **long, "scores beyond a length": scores},
        ][: 1 + (exporting == "fp16")],
        "rewrite": [
            {
                **onnx,
                "W of a layer": (_F64 + 2 * _F32) * d * d,
                "a weight of the graph": max(_F32 * sizes.inner * d, precision * sizes.stack),
            }
        ],
        "verify": [
            {**verify, **reference},
            {
                **verify,
                **(reference if small else {}),
                "the head in float32": 2 * _F32 * sizes.head if exporting in ("fp16", "bf16") else 0,
            },
        ],
    }
    return {stage: max(found, key=lambda one: sum(one.values())) for stage, found in phases.items()}


def lacks_memory(stage: str, taken: Mapping[str, float], free: int) -> str:
    """Why a stage does not fit into the ``free`` memory, in a sentence; empty if it does."""
    needs = sum(taken.values())
    if needs <= free:
        return ""
    most = max((name for name in taken if name != "the program"), key=lambda name: taken[name])
    return (
        f"`{stage}` needs about {shown(needs)} of memory, most of it for {most}, and {shown(free)} are free: use a "
        "machine with more memory, a smaller model, fewer --samples, or --criterion cca."
    )
