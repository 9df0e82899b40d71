"""Check a form of the KV cache before the export: in PyTorch, and beyond long lengths on a small copy of the model.

A model's own code may use cache slots instead of positions, build its own mask from the length of the cache, or let
padding into a convolution. The configuration does not show this; the logits of a short eager run do. So that what
begins at a length (a window, a rope switch) is seen too, a short text crosses each of them.

A window of 4,096 tokens of a large model is beyond what such a run can cross. What begins there is in the model's code
and the numbers of its configuration, not in its weights: so a copy in which it is small (:func:`.small_copy`) is traced
and run in onnxruntime beyond it, in a prefill and by decoding, and must be PyTorch's. Of an encoder all lengths are
crossed so: that it is refused is then said before it is calibrated.
"""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch import F32, MASK, TOKEN_TYPES, TOKENS, Inputs
from nbl_export.errors import InputError, NblError, first_line
from nbl_export.export.forms import ENCODER, FORMS, NONE, STATIC, Form
from nbl_export.export.functions import attention, exportable, is_replaced
from nbl_export.export.fused import check_sizes, unsupported_by_gqa
from nbl_export.export.torch import check_traces, export_torch, trace
from nbl_export.graph.summary import OnCopy
from nbl_export.models.candidates import check_supported
from nbl_export.models.dummy_run import dummy_run
from nbl_export.models.forward import run_uncached
from nbl_export.models.layers import positions as positions_of
from nbl_export.models.layers import vocabulary
from nbl_export.models.lengths import (
    BEYOND,
    REHEARSAL,
    Length,
    Room,
    crossed_by,
    crossing_prompts,
    small_copy,
    small_lengths,
)
from nbl_export.models.running import quiet
from nbl_export.models.weights import resident, room
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.ort import OrtModel, OrtRowsStream, ort_stream
from nbl_export.runtime.stream import DecoderOutput, PastStream, Stream, UncachedStream
from nbl_export.runtime.torch import TorchEncoder, torch_stream

# Two rows of different length, so that one is padded, and the number of tokens decoded after them.
_LENGTHS, _NEXT = (7, 4), 1
_ACROSS = 4  # tokens that are decoded across a length
_SLOTS = 512  # of a static cache: longer than the window of a model that builds its own mask
_TOLERANCE = 1e-2  # of the logits' standard deviation; a wrong mask or position causes an error of about one
# Rows that are run as one batch, and how many of their last tokens are decoded one by one.
_Batch = tuple[Sequence[NDArray[Any]], int]


def check_form(model: torch.nn.Module, form: Form, listener: Listener | None = None) -> tuple[OnCopy, ...]:
    """Raise :class:`InputError` for a model that is not supported, or not with a cache of this ``form``.

    Returns the lengths that were crossed on a copy of the model, or not at all.
    """
    listener, name = listener or Silent(), type(model).__name__
    check_supported(model, cached=form.name != NONE.name, states=form.name != STATIC.name)
    with listener.task("Tracing a few blocks", 1, "trace") as task:
        check_traces(model, form)
        if form.fused and not is_replaced(model):
            trace(model, form)  # the masks can only be checked in the graph
        task.advance(1)
    try:
        with listener.task("Checking the export", 1, "check") as task:
            error = _error(model, form)
            task.advance(1)
    except NblError:
        raise
    except Exception as failed:  # a model's own code may raise anything
        raise InputError(
            f"{name} cannot be run with --kv-cache {form.name} ({first_line(failed)[:300]}): {form.remedy}."
        ) from failed
    if not error <= _TOLERANCE:
        raise InputError(
            f"{name} computes other logits with --kv-cache {form.name} than without (error {error:.1g} of their "
            f"standard deviation), so its masks or positions do not support a batch of padded rows: {form.remedy}."
        )
    return crossed_on_copy(model, FORMS[form.name], listener)  # whatever it reads


def _error(model: torch.nn.Module, form: Form) -> float:
    """The largest difference of ``form`` in PyTorch from the model's own logits, in standard deviations of these."""
    dummy_run(model)  # of the original model, before its functions are replaced
    crossed = crossed_by(model, _ACROSS, _LENGTHS, 1 if form.past else 1 + _ACROSS, REHEARSAL)
    apart, size = any(one.length.batch for one in crossed), vocabulary(model)
    ids = (np.arange(sum(_LENGTHS) + 2 * _NEXT) * 7 + size // 3) % size
    batches: list[_Batch] = [(np.split(ids, [_LENGTHS[0] + _NEXT]), _NEXT if form.past else 0)]
    for prompt in crossing_prompts(crossed):
        row = np.resize(ids, prompt + _ACROSS)
        # With a shorter one beside it, which is padded, unless the longest row of a batch decides for all.
        batches.append(([row] if apart else [row, row[1:]], _ACROSS if form.past else 0))
    # The weights are read once, not at each of these passes.
    with quiet(), torch.inference_mode(), resident(model, room(model)):
        expected = _expected(model, form, batches, apart)
        module = form.module(model)
        decoder: Any = _Eager(module)
        if form.name == STATIC.name:
            most = max(_SLOTS, *(len(row) for rows, _ in batches for row in rows))
            stream: Stream = OrtRowsStream(decoder, min(most, positions_of(model) or most))
        else:
            stream = PastStream(decoder) if form.past else UncachedStream(decoder)
        with exportable(model, module.mask, _grouped if form.fused else attention):
            return _difference(_stepped(stream, batches), expected)


def _grouped(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """:func:`attention`, limited to what GroupQueryAttention computes."""
    who = type(module).__name__
    check_sizes(who, key.shape[-1], value.shape[-1])
    for name, found in (("softcap", "caps its scores"), ("s_aux", "has attention sinks")):
        if kwargs.get(name) is not None:
            raise unsupported_by_gqa(who, found)
    return attention(module, query, key, value, *args, **kwargs)


class _Eager:
    """What a form traces as a decoder in PyTorch, with or without a cache."""

    kv_layers = ()
    interface = SimpleNamespace(static=True)

    def __init__(self, module: Any) -> None:
        self.module = module

    def empty_past(self, batch: int, slots: int = 0) -> Any:
        return [block.empty(torch.zeros(()), batch, slots) for block in dummy_run(self.module.model).cache]

    def __call__(self, *given: Any) -> Any:
        tensors = (torch.from_numpy(one) if isinstance(one, np.ndarray) else one for one in given)
        found = self.module(*itertools.islice(tensors, 4))  # of all logits
        return DecoderOutput(found[0].numpy(), found[1]) if isinstance(found, tuple) else found.numpy()

    def step(self, inputs: Mapping[str, Any], past: Any, _num_logits: int) -> Any:
        """As a graph of the static form is run."""
        return self(*inputs.values(), past)


def _expected(model: torch.nn.Module, form: Form, batches: Iterable[_Batch], apart: bool) -> list[F32]:
    """The model's own logits of each row: by itself and in one pass, so that padding and steps are the form's to bear.

    With ``apart`` the longest row of a batch decides for all, and the text so far for the next token.
    """
    if apart:
        stream = torch_stream(model, cached=bool(form.past))
        return [_logits(stream, [row], steps)[0] for rows, steps in batches for row in rows]
    every = ({TOKENS: row[None].astype(np.int64)} for rows, _ in batches for row in rows)
    return [run_uncached(model, inputs).logits[0].float().cpu().numpy() for inputs in every]


def _stepped(stream: Stream, batches: Iterable[_Batch]) -> list[F32]:
    return [row for rows, steps in batches for row in _logits(stream, rows, steps)]


def _logits(stream: Stream, rows: Sequence[NDArray[Any]], steps: int) -> list[F32]:
    """Of every token of each row, the last ``steps`` of them decoded."""
    before = [len(row) - steps for row in rows]
    first = stream.prefill([row[:end] for row, end in zip(rows, before, strict=True)])
    later = [stream.decode([int(row[at]) for row in rows]) for at in range(-steps, 0)]
    parts = np.split(first, np.cumsum(before)[:-1])
    return [np.concatenate([part, *(one[i : i + 1] for one in later)]) for i, part in enumerate(parts)]


def _difference(found: Sequence[F32], expected: Sequence[F32]) -> float:
    """The largest error, in standard deviations of what is ``expected``; infinite for NaN."""
    own = np.concatenate(expected)
    off = float(np.abs(np.concatenate(found) - own).max() / own.std())
    return off if np.isfinite(off) else float("inf")


# On a copy ----------------------------------------------------------------------------------------

# Tokens that are decoded across a length, from this many before it on.
_STEPS, _BEFORE = 6, 3
_DRAWS = 2  # of weights: where a token is sent to another expert by rounding, other weights do without
_DONE: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, tuple[OnCopy, ...]]] = weakref.WeakKeyDictionary()


def crossed_on_copy(
    model: torch.nn.Module, form: Form, listener: Listener | None = None
) -> tuple[OnCopy, ...]:
    """The lengths of ``model`` that its own rehearsal does not cross, crossed on a copy; done once for a model.

    Raises :class:`InputError` if a graph of this ``form`` computes other logits there than PyTorch.
    """
    known = _DONE.setdefault(model, {})
    if form.name not in known:
        steps, space = (0, Room(0.0)) if form.name == ENCODER else (_STEPS, REHEARSAL)
        crossed = crossed_by(model, steps, passes=1 if form.past else 1 + steps, room=space)
        lengths = [one.length for one in crossed if one.why and one.reached]
        # Of token ids: what a graph of embeddings computes with them is the same.
        known[form.name] = _crossed(model, FORMS.get(form.name, form), lengths, listener or Silent())
    return known[form.name]


def _crossed(
    model: torch.nn.Module, form: Form, lengths: Sequence[Length], listener: Listener
) -> tuple[OnCopy, ...]:
    if not lengths:
        return ()
    small = small_lengths(lengths)
    error = float("inf")
    try:
        with listener.task("Running a small copy", _DRAWS, "copies") as task:
            for seed in range(_DRAWS):
                error = min(error, _error_of_copy(small_copy(model, lengths, seed), form, lengths, small))
                task.advance(1)
                if error <= _TOLERANCE:
                    return tuple(OnCopy(one.key, one.tokens, small[one.tokens]) for one in lengths)
    except Exception as failed:  # a model's own code may raise anything
        why = first_line(failed)[:300].rstrip(".")
        return tuple(OnCopy(one.key, one.tokens, why=why) for one in lengths)
    who = f"The graph of {type(model).__name__}"
    what, remedy = "outputs", "this architecture is not supported yet"
    if form.name != ENCODER:
        who, what = f"{type(model).__name__} with --kv-cache {form.name}", "logits"
        remedy = "use another --kv-cache, or another --exporter"
    names = " or ".join(one.name for one in lengths)
    raise InputError(
        f"{who} computes other {what} than PyTorch beyond {names} (error {error:.1g} of "
        f"their standard deviation on a small copy of it, where that is {' or '.join(map(str, small.values()))}): "
        f"{remedy}."
    )


def _error_of_copy(
    copy: torch.nn.Module, form: Form, lengths: Sequence[Length], small: dict[int, int]
) -> float:
    """The largest difference of the copy's graph from PyTorch, in standard deviations of its outputs."""
    longest, size = max(small.values()) + BEYOND, vocabulary(copy)
    ends = {max(1, n - _BEFORE) for n in small.values()} | {longest, longest - 3}
    rows = [
        np.random.default_rng(i).integers(min(3, size - 1), size, end + _STEPS)  # no padding among them
        for i, end in enumerate(sorted(ends, reverse=True))
    ]
    apart = any(length.batch for length in lengths)
    batches: list[_Batch] = [([row], _STEPS) for row in rows] if apart else [(rows, _STEPS)]
    with quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if form.name == ENCODER:
            encoder: Any = form.module(copy)
            expected = _encoded(TorchEncoder(encoder), form, rows)
            export_torch(copy, path, form=form)
            return _difference(_encoded(OrtModel(path, small=True).encode, form, rows), expected)
        expected = _expected(copy, form, batches, apart)
        export_torch(copy, path, form=form)
        return _difference(_stepped(ort_stream(path, max(map(len, rows))), batches), expected)


def _encoded(run: Callable[[Inputs], dict[str, F32]], form: Form, rows: Iterable[NDArray[Any]]) -> list[F32]:
    """All outputs of an encoder for each row by itself."""
    named = ({TOKENS: row[None], MASK: np.ones_like(row)[None], TOKEN_TYPES: 0 * row[None]} for row in rows)
    every = (run({name: batch[name] for name in form.inputs}) for batch in named)
    return [np.concatenate([one.reshape(-1) for one in outputs.values()]) for outputs in every]
