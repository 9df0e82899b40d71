"""A decoder that reads embeddings instead of token ids, and its embedding as a graph of its own.

Whoever has images puts their embeddings among those of the tokens:

    input_ids ─► embedding.onnx ─► inputs_embeds [batch, sequence, d] ─► model.onnx ─► logits

A model whose positions have several rows (M-RoPE: time, height, width) gets them all: position_ids
[rows, batch, sequence], which are equal for text. One that looks embeddings of each layer up by token ids (Gemma 3n, 4)
gets these, too: per_layer_inputs [batch, sequence, layers, p], which the embedding makes. The names and layouts are
those of onnxruntime-genai.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from nbl_export.batch.names import BATCH, EMBEDDINGS, PER_LAYER, POSITIONS, SEQUENCE, TOKENS
from nbl_export.errors import InputError
from nbl_export.export.forms import Form
from nbl_export.models.dummy_run import example_inputs
from nbl_export.models.forward import CachedDecoder, embedded
from nbl_export.models.layers import backbone, family_of, has_per_layer, hidden_size, position_rows
from nbl_export.models.libraries import quiet
from nbl_export.models.multimodal import placeholders
from nbl_export.settings.choices import OPSETS


class _Embedding(CachedDecoder):
    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = embedded(self.model, input_ids)
        if PER_LAYER in found and (instead := _instead(self.model)) is not None:
            body: Any = backbone(self.model)
            for token in placeholders(self.model).values():
                input_ids = torch.where(input_ids == token, instead, input_ids)
            found[PER_LAYER] = body.get_per_layer_inputs(input_ids)
        return tuple(found.values())


def _instead(model: torch.nn.Module) -> int | None:
    """The token whose embeddings of each layer stand in the places of images and sounds, if it is another."""
    if not family_of(model).padding_stands_in:
        return None
    config: Any = model.config
    return int(config.get_text_config().pad_token_id)


_TOKENS = {0: BATCH, 1: SEQUENCE}


def embedding_form(model: torch.nn.Module) -> Form:
    """The form of the embedding of ``model``: token ids in, embeddings out, and those of each layer."""
    names = [EMBEDDINGS, *[PER_LAYER] * has_per_layer(backbone(model))]
    outputs = dict.fromkeys(names, _TOKENS)
    return Form(
        "embedding",
        OPSETS["none"],
        {TOKENS: _TOKENS},
        past={},
        present={},
        module=_Embedding,
        outputs=outputs,
    )


def reading_embeds(form: Form, model: torch.nn.Module) -> Form:
    """``form`` of a decoder that reads embeddings; raises :class:`InputError` for a model that needs the ids, too."""
    check_embedded_once(model, "leave --inputs embeds out")
    inputs, examples = {EMBEDDINGS: _TOKENS}, {EMBEDDINGS: torch.zeros(2, 3, hidden_size(model))}
    if has_per_layer(body := backbone(model)):
        inputs[PER_LAYER] = _TOKENS
        examples[PER_LAYER] = torch.zeros_like(body.get_per_layer_inputs(torch.zeros(2, 3, dtype=torch.long)))
    inputs |= {name: dict(dims) for name, dims in form.inputs.items() if name != TOKENS}
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
    """Refuse a model that looks its token ids up in more tables than what :func:`embedded` makes of them."""
    ids = example_inputs(model)[TOKENS]
    run: Any = backbone(model)
    tables: list[str] = []
    with ExitStack() as hooks, torch.inference_mode(), quiet():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Embedding):

                def note(_module: Any, args: Any, name: str = name) -> None:
                    if args and args[0].shape == ids.shape and bool((args[0] == ids).all()):
                        tables.append(name)

                hooks.callback(module.register_forward_pre_hook(note).remove)
        embedded(model, ids)
        known = set(tables)
        run(input_ids=ids, use_cache=False)
    if set(tables) <= known:
        return
    if len(found := sorted(set(tables))) > 1:
        raise InputError(
            f"{type(model).__name__} looks up token ids in {len(found)} tables ({', '.join(found)}), "
            f"so embeddings alone do not say what it reads: {remedy}."
        )
