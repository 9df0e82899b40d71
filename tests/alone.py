"""What a graph computes for a batch of padded rows, next to what its model computes for each row alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.batch import left_padded, right_padded
from nbl_export.export.forms import FORMS
from nbl_export.export.torch import export_torch
from nbl_export.models.running import cache_argument
from tests.fixtures_graph import cpu_session


def rows_of(*lengths: int, vocabulary: int = 260, seed: int = 0) -> list[np.ndarray[Any, Any]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, vocabulary - 10, length) for length in lengths]


def own_logits(model: Any, row: Any) -> np.ndarray[Any, Any]:
    """The model's own logits [tokens, vocabulary] of ``row``: no batch, no padding, no cache."""
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = (
            model(input_ids=torch.from_numpy(row)[None], use_cache=False).logits[0].numpy()
        )
        return logits


def own_steps(model: Any, batch: Sequence[Any], steps: int) -> list[np.ndarray[Any, Any]]:
    """The model's own logits of each row: a padded prefill, and ``steps`` tokens one by one with its cache."""
    first = [row[: len(row) - steps] for row in batch]
    ids, mask, positions = (torch.from_numpy(array) for array in left_padded(first))
    lengths = [len(row) for row in first]
    cache = None
    found: list[list[Any]] = [[] for _ in batch]
    for step in range(steps + 1):
        if step:
            ids = torch.tensor([[int(row[n + step - 1])] for row, n in zip(batch, lengths, strict=True)])
            mask, positions = torch.cat([mask, torch.ones_like(ids)], dim=1), positions[:, -1:] + 1
        with torch.inference_mode():
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=True,
                **{cache_argument(model): cache},
            )
        cache = output[cache_argument(model)]
        for i, n in enumerate(lengths):
            found[i].append(output.logits[i, -1:] if step else output.logits[i, -n:])
    return [torch.cat(parts).numpy() for parts in found]


def graph_logits(
    path: Path, form: str, rows: Sequence[Any], steps: int, size: int = 1
) -> list[np.ndarray[Any, Any]]:
    """Each row's logits by the graph: a prefill of all rows, and their last tokens in ``steps`` of ``size`` tokens."""
    session = cpu_session(path)
    run = lambda feeds: session.run(None, {n: np.asarray(a) for n, a in feeds.items()})  # noqa: E731
    if form == "none":
        ids, mask, positions = left_padded(list(rows))
        logits = run({"input_ids": ids, "attention_mask": mask, "position_ids": positions})[0]
        return [logits[i, -len(row) :] for i, row in enumerate(rows)]
    first = [row[: len(row) - steps * size] for row in rows]
    lengths, batch = np.array([len(row) for row in first]), len(rows)
    slots = max(map(len, rows)) + 3 if form == "static" else 0
    past: dict[str, Any] = {
        i.name: np.zeros((batch, i.shape[1], slots, i.shape[3]), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past")
    }
    if form == "static":
        ids, positions = right_padded(first)
        feeds = {"input_ids": ids, "position_ids": positions, "write_indices": np.zeros(batch, np.int64)}
    else:
        ids, mask, positions = left_padded(first)
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits, *present = run(feeds | past)
    found = [[logits[i, :n] if form == "static" else logits[i, -n:]] for i, n in enumerate(lengths)]
    for step in range(steps):
        past = dict(zip(past, present, strict=True))
        done = lengths + step * size
        ids = np.array([row[n : n + size] for row, n in zip(rows, done, strict=True)], np.int64)
        feeds = {"input_ids": ids, "position_ids": done[:, None] + np.arange(size)}
        if form == "static":
            feeds["write_indices"] = done
        else:
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
            feeds["attention_mask"] = mask
        logits, *present = run(feeds | past)
        for i in range(batch):
            found[i].append(logits[i])
    return [np.concatenate(parts) for parts in found]


def furthest(
    model: Any, folder: Path, form: str, rows: Sequence[Any], steps: int, together: bool = False
) -> float:
    """The largest difference of any logit of the exported graph from the model's own of that row alone.

    Where the rows of a batch are meant to depend on each other, the model's are computed ``together``.
    """
    # Before anything of ours touches the model.
    expected = own_steps(model, rows, steps) if together else [own_logits(model, row) for row in rows]
    path = export_torch(model, folder / "model.onnx", form=FORMS[form])[0]
    found = graph_logits(path, form, rows, steps)
    return max(float(np.abs(f - e).max()) for f, e in zip(found, expected, strict=True))
