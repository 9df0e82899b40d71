"""Calibration text sampled from the model itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.calibrate.text import (
    CALIBRATION,
    HELDOUT,
    SELECTION,
    CalibrationText,
    as_tokens,
    end_token,
    rows_by_split,
    start_tokens,
)
from nbl_export.errors import InputError
from nbl_export.models.attention import decoding
from nbl_export.models.dummy_run import cache_shapes
from nbl_export.models.running import accepted_arguments, cache_argument
from nbl_export.models.weights import device_of, half_free, resident, room, streams, weights_like
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings

I32 = NDArray[np.int32]


def sample_from_model(
    model: torch.nn.Module, tokenizer: Any, settings: CalibrateSettings, listener: Listener
) -> CalibrationText:
    """Text sampled from the model by ancestral sampling, packed like any other text.

    Temperature 1 without truncation draws from the distribution the model was trained on, so the activations are
    those of ordinary text. The result is deterministic for a seed on one machine.

    A model that does not stay in memory is read once for each token of a document: all documents whose KV cache has
    room are sampled together, with the same random numbers; a note says so.
    """
    config: Any = model.config
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id, config.bos_token_id)
    start_token = next((t for t in known if t is not None), 0)
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    embedded = int(table.weight.shape[0])
    if not 0 <= start_token < embedded:
        raise InputError(
            f"The tokenizer begins a text with the token {start_token:,}, the model has embeddings of {embedded:,} "
            "tokens: use the tokenizer that the model was trained with."
        )
    generator = torch.Generator().manual_seed(settings.seed)
    length = min(settings.seq_len, _SAMPLE_LENGTH)
    wanted = {split: rows * settings.seq_len for split, rows in rows_by_split(settings).items()}
    counts = {split: -(-tokens // length) for split, tokens in wanted.items()}
    total = sum(counts.values())
    documents: list[I32] = []
    with (
        listener.task("Sampling from the model", total * length, "tokens") as task,
        resident(model, room(model)),
    ):
        at_once = _at_once(model, length, total)
        if streams(model):
            listener.note(
                f"Sampling reads all weights {-(-total // at_once) * length:,} times, once for each token of a "
                "document: name a text with --calibration where that takes too long."
            )
        # The same however many are sampled at once.
        drawn = [min(_DRAWN_BATCH, total - done) for done in range(0, total, _DRAWN_BATCH)]
        numbers = torch.cat([torch.rand(length, n, generator=generator) for n in drawn], dim=1)
        for done in range(0, total, at_once):
            documents.append(_sample(model, start_token, numbers[:, done : done + at_once], task.advance))
    tokens = np.concatenate(documents)
    tokens[:, -1] = as_tokens([end_token(tokenizer)])
    owners = np.repeat(np.arange(len(tokens), dtype=np.int32), length)
    # A document belongs to one split only.
    ends = np.cumsum(list(counts.values())) * length
    first = dict(zip(counts, [0, *ends[:-1]], strict=True))

    def rows(flat: I32, split: str) -> I32:
        return flat[first[split] : first[split] + wanted[split]].reshape(-1, settings.seq_len)

    flat = tokens.reshape(-1)
    return CalibrationText(
        rows(flat, CALIBRATION),
        rows(flat, SELECTION),
        rows(owners, SELECTION),
        rows(flat, HELDOUT),
        rows(owners, HELDOUT),
        start_tokens(tokenizer),
    )


# Many short documents per batch: the matrix products are wide and the KV cache stays small, which is several times
# faster than few long documents.
_SAMPLE_LENGTH = 128
# A step of SmolLM2 in bfloat16 takes 45 ms and 1 more for each document, on two cores: few batches, none of them small.
_SAMPLE_BATCH = 256
# Documents whose random numbers are drawn together.
_DRAWN_BATCH = 152


def _at_once(model: torch.nn.Module, length: int, total: int) -> int:
    """How many of ``total`` documents of ``length`` tokens are sampled at once.

    A model that is read block by block is read once for every token of theirs: as many as have a KV cache in half of
    the memory that is free.
    """
    if not streams(model):
        return -(-total // -(-total // _SAMPLE_BATCH))
    values = sum(s.heads * (s.key_size + s.value_size) for s in cache_shapes(model).values())
    each = length * values * weights_like(model).element_size()
    return max(1, int(half_free(model) // max(1, each)))


def _sample(model: Any, start: int, numbers: torch.Tensor, advance: Any) -> I32:
    """Documents [count, length] of the random ``numbers`` [length, count]."""
    length, count = numbers.shape
    numbers = numbers.to(device_of(model))
    seen = torch.full((count, 1), start, dtype=torch.long, device=device_of(model))
    name, cache = cache_argument(model), None  # the model's own: not every state consists of keys and values
    with torch.inference_mode(), decoding(model):
        for place in range(length):
            ids = seen if cache is None else seen[:, -1:]
            output = model(input_ids=ids, **accepted_arguments(model, use_cache=True, **{name: cache}))
            logits, cache = output.logits, output.get(name)
            tokens = _drawn(
                torch.softmax(logits[:, -1], dim=-1, dtype=torch.float32), numbers[place][:, None]
            )
            seen = torch.cat([seen, tokens], dim=1)
            advance(count)
    return seen[:, 1:].to(torch.int32).cpu().numpy()


# Entries of a distribution that are added up at once: a running sum over a vocabulary takes as long as its softmax.
_ENTRIES = 256


def _drawn(distribution: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The token [rows, 1] of each ``distribution`` [rows, vocab] at its number [rows, 1] in [0, 1).

    Inverse transform sampling: torch.multinomial draws one random number per vocabulary entry, this needs one per
    document. The part of the vocabulary is found first, and the token within it.
    """
    rows, vocab = distribution.shape
    if missing := -vocab % _ENTRIES:
        distribution = torch.nn.functional.pad(distribution, (0, missing))
    parts = distribution.view(rows, -1, _ENTRIES)
    sums = parts.sum(-1)
    ends = sums.cumsum(-1)
    draws = numbers * ends[:, -1:]
    part = torch.searchsorted(ends, draws).clamp_max(ends.shape[1] - 1)
    inside = parts.gather(1, part[..., None].expand(-1, -1, _ENTRIES))[:, 0].cumsum(-1)
    # What is added up in another order may end a rounding error earlier: never behind the last token of the part.
    left = torch.minimum(draws - ends.gather(1, part) + sums.gather(1, part), inside[:, -1:])
    return part * _ENTRIES + torch.searchsorted(inside, left)
