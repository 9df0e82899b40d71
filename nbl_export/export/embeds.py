"""A decoder that reads embeddings instead of token ids, and its embedding as a graph of its own.

Whoever has images puts their embeddings among those of the tokens:

    input_ids ─► embedding.onnx ─► inputs_embeds [batch, sequence, d] ─► model.onnx ─► logits

A model whose positions have several rows (M-RoPE: time, height, width) gets them all: position_ids
[rows, batch, sequence], which are equal for text. The names and layouts are those of onnxruntime-genai.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from nbl_export.batch.names import BATCH, EMBEDDINGS, POSITIONS, SEQUENCE, TOKENS
from nbl_export.errors import InputError
from nbl_export.export.forms import Form
from nbl_export.models.dummy_run import example_inputs
from nbl_export.models.forward import CachedDecoder
from nbl_export.models.layers import backbone, hidden_size, position_rows
from nbl_export.models.quiet import quiet


class _Embedding(CachedDecoder):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.model.get_input_embeddings()(input_ids)  # type: ignore[operator]
        return embedded


_TOKENS = {0: BATCH, 1: SEQUENCE}
EMBEDDING = Form(
    "embedding", 23, {TOKENS: _TOKENS}, past={}, present={}, module=_Embedding, outputs={EMBEDDINGS: _TOKENS}
)


def reading_embeds(form: Form, model: torch.nn.Module) -> Form:
    """``form`` of a decoder that reads embeddings; raises :class:`InputError` for a model that needs the ids, too."""
    check_embedded_once(model, "leave --inputs embeds out")
    inputs = {EMBEDDINGS if name == TOKENS else name: dims for name, dims in form.inputs.items()}
    examples = {EMBEDDINGS: torch.zeros(2, 3, hidden_size(model))}
    rows = position_rows(model)
    if rows > 1 and POSITIONS in inputs:
        inputs[POSITIONS] = {1: BATCH, 2: SEQUENCE}
        examples[POSITIONS] = torch.zeros(rows, 2, 3, dtype=torch.long)

    def module(of: torch.nn.Module) -> CachedDecoder:
        decoder = form.module(of)
        decoder.reads = EMBEDDINGS
        return decoder

    return replace(form, inputs=inputs, examples=examples, module=module)


def check_embedded_once(model: torch.nn.Module, remedy: str) -> None:
    """Refuse a model that looks its token ids up in more tables than one, as for embeddings of each layer."""
    ids = example_inputs(model)[TOKENS]
    tables: list[str] = []
    with ExitStack() as hooks, torch.inference_mode(), quiet():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Embedding):

                def note(_module: Any, args: Any, name: str = name) -> None:
                    if args and args[0].shape == ids.shape and bool((args[0] == ids).all()):
                        tables.append(name)

                hooks.callback(module.register_forward_pre_hook(note).remove)
        run: Any = backbone(model)
        run(input_ids=ids, use_cache=False)
    if len(found := sorted(set(tables))) > 1:
        raise InputError(
            f"{type(model).__name__} looks up token ids in {len(found)} tables ({', '.join(found)}), "
            f"so embeddings alone do not say what it reads: {remedy}."
        )
