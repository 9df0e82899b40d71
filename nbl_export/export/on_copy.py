"""Cross the lengths of a model that are too long for it on a small copy of it, exported in the same form.

A window of 4,096 tokens of a large model is beyond what a check can run. What begins there is in the model's code and
the numbers of its configuration, not in its weights: so the copy (:mod:`nbl_export.models.small_copy`) is traced and
run in onnxruntime beyond its small lengths, in a prefill and by decoding across them, and must be PyTorch's. Of an
encoder all lengths are crossed so: that it is refused is then said before it is calibrated.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nbl_export.batch.names import TOKEN_TYPES, TOKENS
from nbl_export.batch.rows import batch_of_rows, real_positions
from nbl_export.errors import InputError, first_line
from nbl_export.export.forms import ENCODER, FORMS, Form
from nbl_export.export.torch import export_torch
from nbl_export.graph.summary import OnCopy
from nbl_export.models.encoder import Encoder
from nbl_export.models.forward import run_uncached
from nbl_export.models.layers import vocabulary
from nbl_export.models.lengths import BEYOND, REHEARSAL, Length, Room, crossed_by
from nbl_export.models.load import quiet
from nbl_export.models.small_copy import small_copy, small_lengths
from nbl_export.progress import Listener, Silent
from nbl_export.runtime.encoder import OrtEncoder, TorchEncoder
from nbl_export.runtime.ort import ort_stream
from nbl_export.runtime.stream import Stream
from nbl_export.runtime.torch import torch_stream

if TYPE_CHECKING:
    import torch

# Tokens that are decoded across a length, from this many before it on.
_STEPS, _BEFORE = 6, 3
_DRAWS = 2  # of weights: where a token is sent to another expert by rounding, other weights do without
_TOLERANCE = 1e-2  # of the logits' standard deviation; what is left out causes an error of about one
_UNSAID = "no key of the configuration says it, so no copy has it smaller"
_DONE: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, tuple[OnCopy, ...]]] = weakref.WeakKeyDictionary()


def crossed_on_copy(
    model: torch.nn.Module, form: Form, listener: Listener | None = None
) -> tuple[OnCopy, ...]:
    """The lengths of ``model`` that its own rehearsal does not cross, crossed on a copy; done once for a model.

    Raises :class:`InputError` if a graph of this ``form`` computes other logits there than PyTorch.
    """
    known = _DONE.setdefault(model, {})
    if form.name not in known:
        if form.name == ENCODER:
            crossed = crossed_by(model, 0, room=Room(0.0))
        else:
            crossed = crossed_by(model, _STEPS, passes=1 if form.past else 1 + _STEPS, room=REHEARSAL)
        # Of token ids: what a graph of embeddings computes with them is the same.
        known[form.name] = _crossed(
            model,
            FORMS.get(form.name, form),
            [one.length for one in crossed if one.why and one.reached],
            listener or Silent(),
        )
    return known[form.name]


def _crossed(
    model: torch.nn.Module, form: Form, lengths: Sequence[Length], listener: Listener
) -> tuple[OnCopy, ...]:
    unsaid = tuple(OnCopy(one.key, one.tokens, why=_UNSAID) for one in lengths if not one.configured)
    said = [one for one in lengths if one.configured]
    if not said:
        return unsaid
    small = small_lengths(said)
    error, measure = float("inf"), _error_of_encoder if form.name == ENCODER else _error
    try:
        with listener.task("Running a small copy", _DRAWS, "copies") as task:
            for seed in range(_DRAWS):
                error = min(error, measure(small_copy(model, said, seed), form, said, small))
                task.advance(1)
                if error <= _TOLERANCE:
                    break
    except Exception as failed:  # a model's own code may raise anything
        why = first_line(failed)[:300].rstrip(".")
        return (*unsaid, *(OnCopy(one.key, one.tokens, why=why) for one in said))
    if not error <= _TOLERANCE:
        names = " or ".join(one.name for one in said)
        who, what, remedy = (
            f"The graph of {type(model).__name__}",
            "outputs",
            "this architecture is not supported yet",
        )
        if form.name != ENCODER:
            who, what = f"{type(model).__name__} with --kv-cache {form.name}", "logits"
            remedy = "use another --kv-cache, or another --exporter"
        raise InputError(
            f"{who} computes other {what} than PyTorch beyond {names} (error {error:.1g} of their standard deviation "
            f"on a small copy of it, where that is {' or '.join(map(str, small.values()))}): {remedy}."
        )
    return (*unsaid, *(OnCopy(one.key, one.tokens, small[one.tokens]) for one in said))


def _error(copy: torch.nn.Module, form: Form, lengths: Sequence[Length], small: dict[int, int]) -> float:
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
    with quiet():
        if apart:
            own = torch_stream(copy, cached=bool(form.past))
            expected = [np.concatenate(_logits(own, [row])) for row in rows]
        else:
            one_pass = ({TOKENS: row[None].astype(np.int64)} for row in rows)
            expected = [run_uncached(copy, inputs).logits[0].numpy() for inputs in one_pass]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            export_torch(copy, path, form=form)
            stream = ort_stream(path, max(map(len, rows)))
            if apart:
                found = [np.concatenate(_logits(stream, [row])) for row in rows]
            else:
                found = _by_row(_logits(stream, rows), [len(row) - _STEPS for row in rows])
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


def _logits(stream: Stream, rows: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
    """Of the prefill, and of each step."""
    first = stream.prefill([row[:-_STEPS] for row in rows])
    return [first, *(stream.decode([int(row[step]) for row in rows]) for step in range(-_STEPS, 0))]


def _by_row(logits: Sequence[NDArray[np.float32]], prompts: Sequence[int]) -> list[NDArray[np.float32]]:
    parts = np.split(logits[0], np.cumsum(prompts)[:-1])
    return [np.concatenate([part, *(step[i : i + 1] for step in logits[1:])]) for i, part in enumerate(parts)]
