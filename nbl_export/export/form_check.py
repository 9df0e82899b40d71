"""Check a form of the KV cache in PyTorch before the export: a short eager run must give the same logits.

A model's own code may use cache slots instead of positions, build its own mask from the length of the cache, or let
padding into a convolution. The configuration does not show this; the logits do. So that what begins at a length
(a window, a rope switch) is seen too, a short text crosses each of them, or that of a copy of the model in which they
are small (:mod:`.on_copy`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from nbl_export.batch.padding import left_padded, right_padded
from nbl_export.errors import InputError, NblError, first_line
from nbl_export.export.forms import FORMS, NONE, STATIC, Form
from nbl_export.export.functions import attention, exportable, is_replaced
from nbl_export.export.grouped import check_sizes, unsupported_by_gqa
from nbl_export.export.lengths import Branches
from nbl_export.export.on_copy import crossed_on_copy
from nbl_export.export.torch import check_traces, trace
from nbl_export.graph.summary import OnCopy
from nbl_export.models.dummy_run import check_supported, dummy_run
from nbl_export.models.layers import backbone
from nbl_export.models.layers import positions as positions_of
from nbl_export.models.lengths import REHEARSAL, crossed_by, crossing_prompts
from nbl_export.models.load import quiet
from nbl_export.models.weights import resident, room
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.torch import torch_stream

# Two rows of different length, so that one is padded, and the number of tokens decoded after them.
_LENGTHS, _NEXT = (7, 4), 1
_ACROSS = 4  # tokens that are decoded across a length
_SLOTS = 512  # of a static cache: longer than the window of a model that builds its own mask
_TOLERANCE = 1e-2  # of the logits' standard deviation; a wrong mask or position causes an error of about one


def check_form(model: torch.nn.Module, form: Form, listener: Listener | None = None) -> tuple[OnCopy, ...]:
    """Raise :class:`InputError` for a model that is not supported, or not with a cache of this ``form``.

    Returns the lengths that were crossed on a copy of the model, or not at all.
    """
    _check_supported(model, form)
    try:
        error = _error(model, form, listener)
        if error <= _TOLERANCE:
            with (listener or Silent()).task("Tracing a few blocks", 1, "trace") as task:
                _check_trace(model, form)
                task.advance(1)
            return crossed_on_copy(model, FORMS[form.name], listener)  # whatever it reads
        found = (
            f"computes other logits with --kv-cache {form.name} than without (error {error:.1g} of their standard "
            "deviation), so its masks or positions do not support a batch of padded rows"
        )
    except _Failed as failed:
        found = f"cannot be run with --kv-cache {form.name} ({failed})"
    _check_branches(model, form)
    others = [o for o in FORMS.values() if o.name != form.name and _serves(model, o)]
    remedy = f"use --kv-cache {others[0].name}" if others else "this architecture is not supported yet"
    raise InputError(f"{type(model).__name__} {found}: {remedy}.")


class _Failed(Exception):
    """The model's own code failed; the message is its error in one line."""


def _check_supported(model: torch.nn.Module, form: Form) -> None:
    try:
        check_supported(model, cached=form.name != NONE.name, states=form.name != STATIC.name)
    except InputError:
        if form.name != NONE.name:
            check_form(model, NONE)  # it may be advised, so it must be served
        raise


def _check_branches(model: torch.nn.Module, form: Form) -> None:
    """Refuse a model for its branch on the length of a text, if that is why its logits are others."""
    try:
        check_traces(model, form)
    except Branches:
        raise
    except NblError:
        pass


def _failed(error: Exception) -> _Failed:
    return _Failed(first_line(error)[:300])


def _check_trace(model: torch.nn.Module, form: Form) -> None:
    """Refuse a model that loops over its tokens, or branches on their number: no graph is the model."""
    if form.fused and not is_replaced(model):
        trace(model, form)  # the masks can only be checked in the graph
        return
    check_traces(model, form)


def _serves(model: torch.nn.Module, form: Form) -> bool:
    try:
        check_supported(model, cached=form.name != NONE.name, states=form.name != STATIC.name)
        if _error(model, form) > _TOLERANCE:
            return False
        _check_trace(model, form)
        return True
    except (NblError, _Failed):
        return False


def _error(model: torch.nn.Module, form: Form, listener: Listener | None = None) -> float:
    """The largest difference from the model's own logits, in standard deviations of these; infinite for NaN.

    The ``listener`` is told of each pass of the model.
    """
    dummy_run(model)  # of the original model, before its functions are replaced
    crossed = crossed_by(model, _ACROSS, _LENGTHS, 1 if form.past else 1 + _ACROSS, REHEARSAL)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator, union-attr]
    ids = (np.arange(sum(_LENGTHS) + 2 * _NEXT) * 7 + vocabulary // 3) % vocabulary
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
        (listener or Silent()).task("Checking the export", passes, "passes") as task,
        resident(model, room(model)),
        _after_each_pass(model, lambda: task.advance(1)),
    ):
        own = [model(input_ids=torch.from_numpy(text)[None]).logits[0] for text in texts]
        try:
            own += [_own(model, text, stepwise) for row in rows for text in (row, row[1:])[:compared]]
        except Exception as error:
            raise _failed(error) from error
        decoder = form.module(model)
        with exportable(model, decoder.mask, _grouped if form.fused else attention):
            try:
                found = _run(decoder, form, texts)
                for row in rows:
                    found += _run(decoder, form, [row, row[1:]], _ACROSS)[:compared]
            except NblError:
                raise
            except Exception as error:  # a model's own code may raise anything
                raise _failed(error) from error
    expected = torch.cat(own)
    off = float((torch.cat(found) - expected).abs().max() / expected.std())
    return off if np.isfinite(off) else float("inf")


@contextmanager
def _after_each_pass(model: torch.nn.Module, then: Callable[[], None]) -> Iterator[None]:
    hook = backbone(model).register_forward_hook(lambda *_: then())
    try:
        yield
    finally:
        hook.remove()


def _own(model: torch.nn.Module, row: np.ndarray[Any, Any], stepwise: bool) -> torch.Tensor:
    """The model's own logits of a row that crosses a length; ``stepwise`` where a token depends on the text so far."""
    if not stepwise:
        logits: torch.Tensor = model(input_ids=torch.from_numpy(row)[None]).logits[0]
        return logits
    stream = torch_stream(model)
    found = [stream.prefill([row[:-_ACROSS]]), *(stream.decode([int(token)]) for token in row[-_ACROSS:])]
    return torch.from_numpy(np.concatenate(found))


def _grouped(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """:func:`attention`, limited to what GroupQueryAttention computes."""
    who = type(module).__name__
    check_sizes(who, key.shape[-1], value.shape[-1])
    for name, found in (("softcap", "caps its scores"), ("s_aux", "has attention sinks")):
        if kwargs.get(name) is not None:
            raise unsupported_by_gqa(who, found)
    return attention(module, query, key, value, *args, **kwargs)


def _run(
    decoder: Any, form: Form, texts: list[np.ndarray[Any, Any]], steps: int = _NEXT
) -> list[torch.Tensor]:
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
        for step, token in enumerate(after):
            logits, past = decoder(token, lengths[:, None] + step, lengths + step, past)
            found = [[*parts, one] for parts, one in zip(found, logits, strict=True)]
        return [torch.cat(parts) for parts in found]
    ids, mask, positions = (torch.from_numpy(a) for a in left_padded(before))
    logits, past = decoder(ids, mask, positions, past)
    found = [[f[-n:]] for f, n in zip(logits, lengths, strict=True)]
    for token in after:
        mask, positions = torch.cat([mask, torch.ones_like(token)], dim=1), positions[:, -1:] + 1
        logits, past = decoder(token, mask, positions, past)
        found = [[*parts, one] for parts, one in zip(found, logits, strict=True)]
    return [torch.cat(parts) for parts in found]
