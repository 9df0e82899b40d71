"""Trace a model in a form of its KV cache: it grows by concatenation or in place, is static, or does not exist.

``concat``  position_ids, attention_mask over past and sequence; input past [B, H, past, D], output present
            [B, H, past + sequence, D]. Padding on the left. ONNX opset 23.
``shared``  like concat, but past and present may share one buffer, and each row has its own length, the sum of its
            mask: padding on the right. GroupQueryAttention, which only onnxruntime has.
``none``    no cache: the full text is the input of every step. Padding on the left. ONNX opset 23.
``static``  past and present share one buffer [B, H, max, D]; the keys and values of token i are written to slot
            ``write_indices[b] + i`` (`TensorScatter`), and a query sees the slots up to its own. Padding on the
            right, which the next token overwrites. ONNX opset 24, standard operators only.

An encoder has no cache: the full text or image is its input, and the outputs of its task are its outputs.

Whoever has images puts their embeddings among those of the tokens:

    input_ids ─► embedding.onnx ─► inputs_embeds [batch, sequence, d] ─► model.onnx ─► logits

A model whose positions have several rows (M-RoPE: time, height, width) gets them all: position_ids
[rows, batch, sequence], which are equal for text. One that looks embeddings of each layer up by token ids (Gemma 3n, 4)
gets these, too: per_layer_inputs [batch, sequence, layers, p], which the embedding makes. The names and layouts are
those of onnxruntime-genai.

A form is data: names and symbolic dimensions of its inputs, and a module that traces the model in this form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nbl_export.batch import (
    BATCH,
    EMBEDDINGS,
    MASK,
    MAX,
    PAST,
    PER_LAYER,
    PIXELS,
    POSITIONS,
    SEQUENCE,
    TOKENS,
    TOTAL,
    Inputs,
)
from nbl_export.errors import InputError
from nbl_export.export.experts import DENSE, LOOP, MOE
from nbl_export.export.recurrence import SYMBOLIC_DOMAIN, GraphStates, rows_of
from nbl_export.models.dummy_run import Entry, dummy_run
from nbl_export.models.folder import Pooling, Task
from nbl_export.models.forward import (
    INPUT_ORDER,
    CachedDecoder,
    PastLayer,
    Tokens,
    cache_layer,
    cache_with,
    embedded,
    encoder_of,
    encoder_outputs,
    entry_in,
    query_length,
    run_with_past,
)
from nbl_export.models.layers import (
    NOT_YET,
    backbone,
    family_of,
    has_per_layer,
    hidden_size,
    position_rows,
    positions,
)
from nbl_export.models.multimodal import placeholders
from nbl_export.models.running import accepted_arguments, accepts, cache_argument
from nbl_export.settings.choices import OPSETS

ENCODER = "encoder"  # the name of every encoder's form
# The longest text of a model without a limit, and the tokens that a trace takes for granted beside those of a range.
_LONGEST, _FEWEST = 1 << 17, 2


@dataclass(frozen=True)
class Form:
    """One form of the cache. ``inputs`` are those before the cache, in order, with their dimensions.

    ``outputs`` are those before the cache; ``examples`` are traced with instead of zeros. ``fused`` graphs use
    onnxruntime's own operators for attention and for residual norms. ``remedy`` is for a model that it is not for.
    ``experts`` is the form of a mixture's experts (:mod:`.experts`).
    """

    name: str
    opset: int
    inputs: Mapping[str, Mapping[int, str]]
    past: Mapping[int, str]
    present: Mapping[int, str]
    module: Callable[[torch.nn.Module], CachedDecoder]
    outputs: Mapping[str, Mapping[int, str]] = field(
        default_factory=lambda: {"logits": {0: BATCH, 1: SEQUENCE}}
    )
    examples: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fused: bool = False
    remedy: str = NOT_YET
    experts: str = LOOP

    def capture(self, decoder: CachedDecoder) -> torch.export.ExportedProgram:
        """Trace ``decoder``; every dimension named here is dynamic.

        Raises :class:`Branches` if the trace does not hold for every text that the model is for.
        """
        # Sizes of 0 or 1 would become constants, and equal sizes could be unified, so all differ.
        sizes = {BATCH: 2, SEQUENCE: 3, PAST: 5, TOTAL: 8, MAX: 7}
        args: list[Any] = [
            self.examples[name]
            if name in self.examples
            else torch.zeros([sizes[d] for d in dims.values()], dtype=torch.long)
            for name, dims in self.inputs.items()
        ]
        free = torch.export.Dim.DYNAMIC
        named: list[Any] = [dict.fromkeys(dims, free) for dims in self.inputs.values()]
        if PER_LAYER in self.inputs:  # which is the second, and goes together with the first
            args[:2], named[:2] = [tuple(args[:2])], [tuple(named[:2])]
        if self.past:
            batch, length = sizes[self.past[0]], sizes[self.past[2]]
            blocks = dummy_run(decoder.model).cache
            args.append([block.empty(torch.zeros(()), batch, length) for block in blocks])
            of_pair = (dict.fromkeys(self.past, free),) * 2
            named.append([(*(of_pair if b.kv else ()), *({0: free} for _ in b.states)) for b in blocks])
        program = torch.export.export(decoder, tuple(args), dynamic_shapes=tuple(named), strict=False)
        _check_lengths(program, decoder.model, cached=bool(self.past))
        return program


class Branches(InputError):
    """A model computes longer texts in another way than those that it is traced with."""


def _check_lengths(program: torch.export.ExportedProgram, model: torch.nn.Module, cached: bool) -> None:
    """Raise :class:`Branches` unless ``program`` holds for all texts of up to the positions of ``model``.

    `torch.export` follows one branch of a model's code ("longer than the window?"). What that takes for granted of a
    size is the size's range.
    """
    most = [limits.upper for limits in program.range_constraints.values()]
    bound = min((int(upper) for upper in most if upper < _LONGEST), default=_LONGEST) + _FEWEST * cached
    # A range that ends one token before the last, as "not as long as the table", is no branch.
    if bound < (positions(model) or _LONGEST) - 1:
        raise Branches(
            f"{type(model).__name__} computes texts of more than {bound:,} tokens in another way than shorter ones, by "
            "a branch of its code, and a graph would hold the way of the shorter ones alone: it is not supported yet."
        )


# concat ------------------------------------------------------------------------------------------


class _Concat(CachedDecoder):
    def forward(
        self,
        input_ids: Tokens,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[Entry],
    ) -> Any:
        length = attention_mask.shape[1] - self.main(input_ids).shape[1]
        for block, entry in zip(dummy_run(self.model).cache, past, strict=True):
            for side in block.parts(entry)[0]:
                torch._check(side.shape[2] == length)  # type: ignore[no-untyped-call]
        with rows_of(attention_mask, self.main(input_ids)):
            return run_with_past(
                self.model,
                self.given(input_ids),
                attention_mask,
                position_ids,
                past,
                length,
                of_states=GraphStates,
            )


# none --------------------------------------------------------------------------------------------


class _Uncached(CachedDecoder):
    def forward(
        self, input_ids: Tokens, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        torch._check(attention_mask.shape[1] == self.main(input_ids).shape[1])  # type: ignore[no-untyped-call]
        with rows_of(attention_mask, self.main(input_ids)):
            logits: torch.Tensor = self.model(
                **self.given(input_ids),
                attention_mask=attention_mask,
                use_cache=False,
                **accepted_arguments(self.model, position_ids=position_ids),
            ).logits
        return logits


# static ------------------------------------------------------------------------------------------


class _StaticLayer(PastLayer):
    """A cache layer that writes into its buffer instead of growing."""

    def __init__(self, write_indices: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(0, keys, values)
        self.write_indices = write_indices

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        self.keys = self._write(self.keys, key_states)
        self.values = self._write(self.values, value_states)
        return self.keys, self.values

    def _write(self, buffer: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting():  # an eager run
            slots = self.write_indices[:, None] + torch.arange(new.shape[2])
            return buffer.scatter(2, slots[:, None, :, None].expand_as(new), new)
        written: torch.Tensor = torch.onnx.ops.symbolic(
            f"{SYMBOLIC_DOMAIN}::TensorScatter",
            [buffer, new, self.write_indices],
            {"axis": -2, "mode": "linear"},
            dtype=buffer.dtype,
            shape=buffer.shape,
        )
        return written

    def get_mask_sizes(self, query: Any) -> tuple[Any, int]:
        return self.keys.shape[2], 0


class _Static(CachedDecoder):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        if not accepts(model, "position_ids"):
            raise InputError(
                f"{type(model).__name__} takes no position_ids, which a static cache needs: use --kv-cache concat."
            )
        self._write_indices: torch.Tensor | None = None  # of the current forward pass
        self._mask_made = False

    def forward(
        self,
        input_ids: Tokens,
        position_ids: torch.Tensor,
        write_indices: torch.Tensor,
        past: list[Entry],
    ) -> Any:
        sides = [side for entry in past for side in entry]
        for side in sides:
            torch._check(side.shape[2] == sides[0].shape[2])  # type: ignore[no-untyped-call]
        blocks = dummy_run(self.model).cache
        layers = [
            _StaticLayer(write_indices, *entry) if block.kv else cache_layer(block, entry, 0)
            for block, entry in zip(blocks, past, strict=True)
        ]
        cache = cache_with(layers)
        self._write_indices, self._mask_made = write_indices, False
        output = self.model(
            **self.given(input_ids),
            position_ids=position_ids,
            use_cache=True,
            **{cache_argument(self.model): cache},
        )
        if not self._mask_made:
            raise InputError(
                f"{type(self.model).__name__} makes its attention mask itself, and not for a static cache: use "
                "--kv-cache concat."
            )
        return output.logits, [entry_in(cache, i, block) for i, block in enumerate(blocks)]

    def mask(  # type: ignore[override]
        self,
        batch_size: Any,
        kv_length: Any,
        mask_function: Callable[..., Any],
        q_length: Any = None,
        cache_position: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        """[batch, 1, query, max] bool from the family's own mask function (causal, sliding window …) of two slots.

        ``mask_function(batch, head, query slot, key slot)`` is elementwise, so slots may differ between rows.
        """
        assert self._write_indices is not None
        self._mask_made = True
        count = query_length(q_length if cache_position is None else cache_position)
        query = (self._write_indices[:, None] + torch.arange(count))[:, None, :, None]
        key = torch.arange(kv_length)[None, None, None, :]
        rows = torch.arange(batch_size)[:, None, None, None]
        visible: torch.Tensor = mask_function(rows, torch.zeros(1, 1, 1, 1, dtype=torch.long), query, key)
        return visible


_TOKENS = {0: BATCH, 1: SEQUENCE}
CONCAT = Form(
    "concat",
    OPSETS["concat"],
    {"input_ids": _TOKENS, "attention_mask": {0: BATCH, 1: TOTAL}, "position_ids": _TOKENS},
    past={0: BATCH, 2: PAST},
    present={0: BATCH, 2: TOTAL},
    module=_Concat,
    remedy="try --kv-cache none",
)
SHARED = replace(CONCAT, name="shared", fused=True, remedy="use --kv-cache concat", experts=MOE)
NONE = Form(
    "none",
    OPSETS["none"],
    {"input_ids": _TOKENS, "attention_mask": _TOKENS, "position_ids": _TOKENS},
    past={},
    present={},
    module=_Uncached,
)
STATIC = Form(
    "static",
    OPSETS["static"],
    {"input_ids": _TOKENS, "position_ids": _TOKENS, "write_indices": {0: BATCH}},
    past={0: BATCH, 2: MAX},
    present={0: BATCH, 2: MAX},
    module=_Static,
    remedy="use --kv-cache concat",
    experts=DENSE,
)
FORMS = {form.name: form for form in (CONCAT, SHARED, STATIC, NONE)}


# encoder -----------------------------------------------------------------------------------------


def encoder_form(model: torch.nn.Module, task: Task, pooling: Pooling | None, inputs: Inputs) -> Form:
    """The form of the encoder ``model``, whose batches have the names and shapes of ``inputs``.

    Inputs are input_ids, attention_mask and optionally token_type_ids [batch, sequence], or pixel_values of one size;
    outputs those of the ``task``, float32. The names are those of optimum.
    """
    examples = {MASK: torch.ones(2, 3, dtype=torch.long)}
    if PIXELS in inputs:
        examples[PIXELS] = torch.zeros(2, *inputs[PIXELS].shape[1:])
    return Form(
        ENCODER,
        OPSETS["none"],
        {name: {0: BATCH} if name == PIXELS else _TOKENS for name in INPUT_ORDER if name in inputs},
        past={},
        present={},
        module=lambda m: encoder_of(m, task, pooling, inputs, rows_of),
        outputs={n: dict(enumerate(dims)) for n, dims in encoder_outputs(model, task, pooling).items()},
        examples=examples,
    )


# embeddings ---------------------------------------------------------------------------------------


class _Embedding(CachedDecoder):
    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found, config = embedded(self.model, input_ids), self.model.config
        if PER_LAYER in found and family_of(self.model).padding_stands_in:
            # Another token's embeddings of each layer stand in the places of images and sounds.
            body: Any = backbone(self.model)
            instead = int(config.get_text_config().pad_token_id)  # type: ignore[operator, union-attr]
            for token in placeholders(self.model).values():
                input_ids = torch.where(input_ids == token, instead, input_ids)
            found[PER_LAYER] = body.get_per_layer_inputs(input_ids)
        return tuple(found.values())


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
    """``form`` of a decoder that reads embeddings."""
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
