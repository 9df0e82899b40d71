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

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch.names import TOKEN_TYPES, TOKENS
from nbl_export.batch.rows import batch_of_rows, left_padded, real_positions, right_padded
from nbl_export.errors import InputError, NblError, first_line
from nbl_export.export.forms import ENCODER, FORMS, NONE, STATIC, Branches, Form
from nbl_export.export.functions import attention, exportable, is_replaced
from nbl_export.export.fused import check_sizes, unsupported_by_gqa
from nbl_export.export.torch import check_traces, export_torch, trace
from nbl_export.graph.summary import OnCopy
from nbl_export.models.dummy_run import check_supported, dummy_run
from nbl_export.models.forward import Encoder, run_uncached
from nbl_export.models.layers import backbone, vocabulary
from nbl_export.models.layers import positions as positions_of
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
from nbl_export.models.libraries import quiet
from nbl_export.models.weights import resident, room
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.ort import OrtEncoder, ort_stream
from nbl_export.runtime.stream import Stream
from nbl_export.runtime.torch import TorchEncoder, torch_stream

# Two rows of different length, so that one is padded, and the number of tokens decoded after them.
_LENGTHS, _NEXT = (7, 4), 1
_ACROSS = 4  # tokens that are decoded across a length
_SLOTS = 512  # of a static cache: longer than the window of a model that builds its own mask
_TOLERANCE = 1e-2  # of the logits' standard deviation; a wrong mask or position causes an error of about one


def check_form(model: torch.nn.Module, form: Form, listener: Listener | None = None) -> tuple[OnCopy, ...]:
    """Raise :class:`InputError` for a model that is not supported, or not with a cache of this ``form``.

    Returns the lengths that were crossed on a copy of the model, or not at all.
    """
    listener = listener or Silent()
    try:
        _check_layers(model, form)
    except InputError:
        if form.name != NONE.name:
            check_form(model, NONE)  # it may be advised, so it must be served
        raise
    try:
        error = _error(model, form, listener)
        if error <= _TOLERANCE:
            with listener.task("Tracing a few blocks", 1, "trace") as task:
                _check_trace(model, form)
                task.advance(1)
            return crossed_on_copy(model, FORMS[form.name], listener)  # whatever it reads
        found = (
            f"computes other logits with --kv-cache {form.name} than without (error {error:.1g} of their standard "
            "deviation), so its masks or positions do not support a batch of padded rows"
        )
    except _Failed as failed:
        found = f"cannot be run with --kv-cache {form.name} ({failed})"
    try:
        check_traces(model, form)
    except Branches:  # which is why its logits are others
        raise
    except NblError:
        pass
    others = [other for other in FORMS.values() if other.name != form.name and _serves(model, other)]
    remedy = f"use --kv-cache {others[0].name}" if others else "this architecture is not supported yet"
    raise InputError(f"{type(model).__name__} {found}: {remedy}.")


class _Failed(Exception):
    """The model's own code failed; the message is its error in one line."""


def _check_layers(model: torch.nn.Module, form: Form) -> None:
    check_supported(model, cached=form.name != NONE.name, states=form.name != STATIC.name)


def _check_trace(model: torch.nn.Module, form: Form) -> None:
    """Refuse a model that loops over its tokens, or branches on their number: no graph is the model."""
    if form.fused and not is_replaced(model):
        trace(model, form)  # the masks can only be checked in the graph
    else:
        check_traces(model, form)


def _serves(model: torch.nn.Module, form: Form) -> bool:
    try:
        _check_layers(model, form)
        if _error(model, form, Silent()) > _TOLERANCE:
            return False
        _check_trace(model, form)
        return True
    except (NblError, _Failed):
        return False


def _error(model: torch.nn.Module, form: Form, listener: Listener) -> float:
    """The largest difference from the model's own logits, in standard deviations of these; infinite for NaN.

    The ``listener`` is told of each pass of the model.
    """
    dummy_run(model)  # of the original model, before its functions are replaced
    crossed = crossed_by(model, _ACROSS, _LENGTHS, 1 if form.past else 1 + _ACROSS, REHEARSAL)
    size = vocabulary(model)
    ids = (np.arange(sum(_LENGTHS) + 2 * _NEXT) * 7 + size // 3) % size
    texts = np.split(ids, [_LENGTHS[0] + _NEXT])
    rows = [np.resize(ids, prompt + _ACROSS) for prompt in crossing_prompts(crossed)]
    # Each with a shorter one beside it, which is padded; where the longest row of a batch decides for all, that one is
    # another text than by itself.
    compared = 1 if any(one.length.batch for one in crossed) else 2
    stepwise = compared == 1 and bool(form.past)
    steps = _ACROSS if form.past else 0
    passes = len(texts) + 1 + (_NEXT if form.past else 0)
    passes += len(rows) * (compared * (1 + _ACROSS * stepwise) + 1 + steps)
    # The weights are read once, not at each of these passes.
    with (
        quiet(),
        torch.inference_mode(),
        listener.task("Checking the export", passes, "passes") as task,
        resident(model, room(model)),
    ):
        hook = backbone(model).register_forward_hook(lambda *_: task.advance(1))
        try:
            own = [model(input_ids=torch.from_numpy(text)[None]).logits[0] for text in texts]
            own += [_own(model, text, stepwise) for row in rows for text in (row, row[1:])[:compared]]
            decoder = form.module(model)
            with exportable(model, decoder.mask, _grouped if form.fused else attention):
                found = _run(decoder, form, texts)
                for row in rows:
                    found += _run(decoder, form, [row, row[1:]], _ACROSS)[:compared]
        except NblError:
            raise
        except Exception as error:  # a model's own code may raise anything
            raise _Failed(first_line(error)[:300]) from error
        finally:
            hook.remove()
    expected = torch.cat(own)
    off = float((torch.cat(found) - expected).abs().max() / expected.std())
    return off if np.isfinite(off) else float("inf")


def _own(model: torch.nn.Module, row: NDArray[Any], stepwise: bool) -> torch.Tensor:
    """The model's own logits of a row that crosses a length; ``stepwise`` where a token depends on the text so far."""
    if stepwise:
        return torch.from_numpy(np.concatenate(_logits(torch_stream(model), [row], _ACROSS)))
    logits: torch.Tensor = model(input_ids=torch.from_numpy(row)[None]).logits[0]
    return logits


def _grouped(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """:func:`attention`, limited to what GroupQueryAttention computes."""
    who = type(module).__name__
    check_sizes(who, key.shape[-1], value.shape[-1])
    for name, found in (("softcap", "caps its scores"), ("s_aux", "has attention sinks")):
        if kwargs.get(name) is not None:
            raise unsupported_by_gqa(who, found)
    return attention(module, query, key, value, *args, **kwargs)


def _run(decoder: Any, form: Form, texts: list[NDArray[Any]], steps: int = _NEXT) -> list[torch.Tensor]:
    """Logits of every token of ``texts``, as one batch: a prefill and, with a cache, ``steps`` decode steps."""
    if not form.past:
        ids, mask, positions = (torch.from_numpy(a) for a in left_padded(texts))
        return [row[-len(text) :] for row, text in zip(decoder(ids, mask, positions), texts, strict=True)]
    static = form.name == STATIC.name
    before = [t[:-steps] for t in texts]
    after = [torch.from_numpy(np.stack([t[at:][:1] for t in texts])) for at in range(-steps, 0)]
    lengths = torch.tensor([len(t) for t in before])
    most = max(_SLOTS, int(lengths.max()) + steps)
    slots = min(most, positions_of(decoder.model) or most) if static else 0
    past = [block.empty(torch.zeros(()), len(texts), slots) for block in dummy_run(decoder.model).cache]
    if static:
        ids, positions = (torch.from_numpy(a) for a in right_padded(before))
        logits, past = decoder(ids, positions, torch.zeros_like(lengths), past)
        found = [[f[:n]] for f, n in zip(logits, lengths, strict=True)]
    else:
        ids, mask, positions = (torch.from_numpy(a) for a in left_padded(before))
        logits, past = decoder(ids, mask, positions, past)
        found = [[f[-n:]] for f, n in zip(logits, lengths, strict=True)]
    for step, token in enumerate(after):
        if static:
            logits, past = decoder(token, lengths[:, None] + step, lengths + step, past)
        else:
            mask, positions = torch.cat([mask, torch.ones_like(token)], dim=1), positions[:, -1:] + 1
            logits, past = decoder(token, mask, positions, past)
        found = [[*parts, one] for parts, one in zip(found, logits, strict=True)]
    return [torch.cat(parts) for parts in found]


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
    error, measure = float("inf"), _error_of_encoder if form.name == ENCODER else _error_of_copy
    try:
        with listener.task("Running a small copy", _DRAWS, "copies") as task:
            for seed in range(_DRAWS):
                error = min(error, measure(small_copy(model, lengths, seed), form, lengths, small))
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
    """The largest difference of the copy's graph from PyTorch, in standard deviations of its logits."""
    longest, size = max(small.values()) + BEYOND, vocabulary(copy)
    prompts = sorted({max(1, n - _BEFORE) for n in small.values()} | {longest, longest - 3}, reverse=True)
    rows = [
        (np.random.default_rng(i).integers(0, size, prompt + _STEPS)).astype(np.int32)
        for i, prompt in enumerate(prompts)
    ]
    # PyTorch runs each row by itself and in one pass: padding and steps are the graph's to bear. Unless the longest row
    # decides for all, and the text so far for the next token.
    apart = any(length.batch for length in lengths)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        if apart:
            own = torch_stream(copy, cached=bool(form.past))
            expected = [np.concatenate(_logits(own, [row])) for row in rows]
        else:
            one_pass = ({TOKENS: row[None].astype(np.int64)} for row in rows)
            expected = [run_uncached(copy, inputs).logits[0].numpy() for inputs in one_pass]
        export_torch(copy, path, form=form)
        stream = ort_stream(path, max(map(len, rows)))
        if apart:
            found = [np.concatenate(_logits(stream, [row])) for row in rows]
        else:
            first, *later = _logits(stream, rows)
            parts = np.split(first, np.cumsum([len(row) - _STEPS for row in rows])[:-1])
            found = [
                np.concatenate([part, *(one[i : i + 1] for one in later)]) for i, part in enumerate(parts)
            ]
    deviation = float(np.concatenate(expected).std())
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) / deviation


def _error_of_encoder(
    copy: torch.nn.Module, form: Form, lengths: Sequence[Length], small: dict[int, int]
) -> float:
    """The same of an encoder, of the outputs for tokens: those for rows are made of them."""
    generator, size = np.random.default_rng(0), vocabulary(copy)
    rows = []
    for length in (max(small.values()) + BEYOND, max(small.values()) + 2, min(small.values()) // 2):
        row = {TOKENS: generator.integers(min(3, size - 1), size, (1, length))}  # no padding among them
        rows.append(row | ({TOKEN_TYPES: np.zeros_like(row[TOKENS])} if TOKEN_TYPES in form.inputs else {}))
    together = batch_of_rows(rows)
    # Unless the longest row decides for all, PyTorch runs each by itself: padding is the graph's to bear.
    apart = [together] if any(one.batch for one in lengths) else [batch_of_rows([row]) for row in rows]
    encoder = form.module(copy)
    assert isinstance(encoder, Encoder)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        own = [TorchEncoder(encoder)({n: batch[n] for n in form.inputs}) for batch in apart]
        path = Path(folder) / "model.onnx"
        export_torch(copy, path, form=form)
        found = OrtEncoder(path, small=True)({n: together[n] for n in form.inputs})
    worst = 0.0
    for name, values in found.items():
        of_tokens = values.ndim == 3 and values.shape[1] == together[TOKENS].shape[1]
        masks = [real_positions(batch, 0) if of_tokens else slice(None) for batch in (together, *apart)]
        expected = np.concatenate([one[name][mask] for one, mask in zip(own, masks[1:], strict=True)])
        worst = max(worst, float(np.abs(values[masks[0]] - expected).max() / expected.std()))
    return worst


def _logits(stream: Stream, rows: Sequence[NDArray[Any]], steps: int = _STEPS) -> list[NDArray[np.float32]]:
    """Of the prefill, and of each of the last ``steps`` tokens."""
    first = stream.prefill([row[:-steps] for row in rows])
    return [first, *(stream.decode([int(row[at]) for row in rows]) for at in range(-steps, 0))]
