"""Calibration text sampled from the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
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
from nbl_export.models.compat import cache_argument
from nbl_export.models.layers import accepted_arguments
from nbl_export.models.weights import device_of, resident, room
from nbl_export.progress import Listener
from nbl_export.settings import CalibrateSettings

if TYPE_CHECKING:
    import torch

I32 = NDArray[np.int32]


def sample_from_model(
    model: torch.nn.Module, tokenizer: Any, settings: CalibrateSettings, listener: Listener
) -> CalibrationText:
    """Text sampled from the model by ancestral sampling, packed like any other text.

    Temperature 1 without truncation draws from the distribution the model was trained on, so the activations are
    those of ordinary text. The result is deterministic for a seed on one machine.
    """
    import torch

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
        for done in range(0, total, _SAMPLE_BATCH):
            batch = min(_SAMPLE_BATCH, total - done)
            documents.append(_sample(model, batch, length, start_token, generator, task.advance))
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
_SAMPLE_BATCH = 152


def _sample(model: Any, batch: int, length: int, start: int, generator: torch.Generator, advance: Any) -> I32:
    import torch

    seen = torch.full((batch, 1), start, dtype=torch.long, device=device_of(model))
    name, cache = (
        cache_argument(model),
        None,
    )  # the model's own cache: not every state consists of keys and values
    with torch.inference_mode():
        for _ in range(length):
            ids = seen if cache is None else seen[:, -1:]
            output = model(input_ids=ids, **accepted_arguments(model, use_cache=True, **{name: cache}))
            logits, cache = output.logits, output.get(name)
            # Inverse transform sampling: torch.multinomial draws one random number per vocabulary entry, this draws
            # one per document.
            distribution = torch.softmax(logits[:, -1].float(), dim=-1).cumsum(dim=-1)
            draws = torch.rand(batch, 1, generator=generator).to(seen.device) * distribution[:, -1:]
            tokens = torch.searchsorted(distribution, draws).clamp_max(logits.shape[-1] - 1)
            seen = torch.cat([seen, tokens], dim=1)
            advance(batch)
    return seen[:, 1:].to(torch.int32).cpu().numpy()
