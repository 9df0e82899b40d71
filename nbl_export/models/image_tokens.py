"""Tokens that stand for the embeddings of images, so that rows with images are rows of tokens as any others.

A language model is given images as embeddings among those of its tokens. Each such embedding is a token here, with a
number from :data:`FIRST` on, which no vocabulary has: a row of a table beside the model's own. Within :func:`seeing`
the model understands them. Whatever else it is given for an image is derived of them, too: positions of several rows
(M-RoPE), and a mask by which the tokens of one image attend to each other in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch.arrays import F32
from nbl_export.batch.image_ids import FIRST, are_images
from nbl_export.batch.names import EMBEDDINGS, POSITIONS
from nbl_export.errors import InputError
from nbl_export.models.layers import backbone
from nbl_export.tensorfile import load_as, save_tensors

I32 = NDArray[np.int32]
FORMAT = "nbl-export/image-tokens/1"


def written(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` as targets of predictions: 0 for what nobody predicts, the embeddings of images."""
    return torch.where(are_images(rows), 0, rows)


@dataclass(frozen=True)
class ImageTokens:
    """What is known of the tokens :data:`FIRST`, :data:`FIRST` + 1 …, in this order.

    ``features`` [tokens, d] float32 are their embeddings. ``offsets`` [tokens, rows] are their positions after that of
    the token before the image, and ``steps`` [tokens] how far the position of the next token is beyond that. ``block``
    [tokens] is the number of their image. ``both_ways`` [1] is 1 if the tokens of an image attend to each other in both
    directions. All of these are int32.
    """

    features: F32
    offsets: I32
    steps: I32
    block: I32
    both_ways: I32

    def __len__(self) -> int:
        return len(self.features)

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        """The positions [rows, batch, seq] of ``ids`` [batch, seq] int64."""
        there, index = self._index(ids)
        steps = torch.where(there, self._at(self.steps, index), 1)
        offsets = torch.where(there[..., None], self._at(self.offsets, index), 0)
        return (steps.cumsum(-1) - steps + offsets.movedim(-1, 0)).long()

    def may_attend(self, ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
        """Which tokens each of ``ids`` [batch, seq] attends to, [batch, seq, seq]."""
        there, index = self._index(ids)
        places = torch.arange(ids.shape[1], device=ids.device)
        before = places[:, None] - places
        allowed = (before >= 0).expand(len(ids), -1, -1)
        if int(self.both_ways[0]):
            block = torch.where(there, self._at(self.block, index), -1)
            allowed = allowed | ((block[:, :, None] == block[:, None]) & there[:, :, None])
        return allowed if window is None else allowed & (before < window)

    def embeddings(self, ids: torch.Tensor, model: Any) -> torch.Tensor:
        """The embeddings [batch, seq, d] of ``ids``, of which those of text are the table's of ``model``."""
        there, index = self._index(ids)
        table: torch.Tensor = model.get_input_embeddings()(written(ids))
        features = torch.from_numpy(self.features[index[there].cpu().numpy()])
        return table.clone().masked_scatter(there[..., None], features.to(table))

    def given(self, row: I32, model: Any) -> dict[str, NDArray[Any]]:
        """What a graph reads of ``row`` [seq]: embeddings [1, seq, d] float32, and positions of one row or several."""
        ids = torch.from_numpy(row.astype(np.int64))[None]
        with torch.inference_mode():
            embedded = self.embeddings(ids, model).float().cpu().numpy()
        found = self.positions(ids).numpy()
        return {EMBEDDINGS: embedded, POSITIONS: found if len(found) > 1 else found[0]}

    def _index(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        there = are_images(ids)
        return there, torch.where(there, ids - FIRST, 0)

    @staticmethod
    def _at(values: I32, index: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(values).to(index.device)[index]


def masks(images: ImageTokens, ids: torch.Tensor, config: Any, like: torch.Tensor) -> Any:
    """The mask of ``ids`` [batch, seq] as a language model takes it that has its own for each kind of layer.

    0 where a token is attended to, and the lowest number of ``like`` elsewhere.
    """

    def made(window: int | None) -> torch.Tensor:
        allowed = images.may_attend(ids, window)[:, None]
        return torch.zeros(allowed.shape, dtype=like.dtype, device=ids.device).masked_fill(
            ~allowed, torch.finfo(like.dtype).min
        )

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return made(window)
    return {kind: made(window if kind == "sliding_attention" else None) for kind in kinds}


@contextmanager
def seeing(model: Any, images: ImageTokens | None) -> Iterator[None]:
    """Within the block, ``model`` takes rows with tokens of ``images``; without any, nothing is changed."""
    if images is None:
        yield
        return
    body = backbone(model)

    def put_in(_body: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        ids = kwargs.get("input_ids")
        if ids is None or not bool(are_images(ids).any()):
            return None
        embedded = images.embeddings(ids, model)
        given = {**kwargs, "input_ids": None, "inputs_embeds": embedded}
        if images.offsets.shape[1] > 1:
            given["position_ids"] = images.positions(ids)
        if int(images.both_ways[0]):
            given["attention_mask"] = masks(images, ids, model.config.get_text_config(), embedded)
        return args, given

    hook = body.register_forward_pre_hook(put_in, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def save_images(path: Path, images: ImageTokens) -> None:
    """Write what is known of the tokens of images, atomically."""
    save_tensors(path, FORMAT, {name: getattr(images, name) for name in ImageTokens.__annotations__})


def load_images(path: Path, remedy: str) -> ImageTokens:
    """Read what :func:`save_images` wrote; raises :class:`InputError` for anything else."""
    images = load_as(ImageTokens, path, FORMAT, remedy)
    whole = (images.offsets, images.steps, images.block, images.both_ways)
    if (
        images.features.ndim != 2
        or images.features.dtype != np.float32
        or images.offsets.ndim != 2
        or any(array.dtype != np.int32 for array in whole)
        or any(len(array) != len(images) for array in whole[:3])
        or images.both_ways.shape != (1,)
        or not np.isfinite(images.features).all()
    ):
        raise InputError(f"{path} is damaged (its arrays are not tokens of images): {remedy}.")
    return images
