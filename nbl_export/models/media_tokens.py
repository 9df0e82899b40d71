"""Put tokens in the places of the embeddings of images, so that rows with them are rows of tokens as any others.

A language model is given an image as embeddings among those of its tokens. Each such embedding is a token
here, with a number from :data:`FIRST` on, which no vocabulary has: a row of a table beside the model's own. Within
:func:`seeing` the model understands them. Whatever else it is given for them is derived of them, too: positions of
several rows (M-RoPE), a mask by which the tokens of one image attend to each other in both directions, embeddings of
each layer (Gemma 3n), and what is added after the first layers (deepstack: Qwen3-VL).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nbl_export.batch import EMBEDDINGS, F32, FIRST, PER_LAYER, POSITIONS, are_media
from nbl_export.models.layers import backbone, has_per_layer
from nbl_export.models.running import Hooks

I32 = NDArray[np.int32]
# How transformers calls what a language model may be given beside the embeddings of its tokens.
PLACES, LATER = "visual_pos_masks", "deepstack_visual_embeds"

NO_BLOCK = -1  # of a token that attends to none after it
WITHIN_WINDOWS = 2  # both_ways in layers with a window alone


def written(rows: torch.Tensor) -> torch.Tensor:
    """``rows`` as targets of predictions: 0 for what nobody predicts, the embeddings of images and sounds."""
    return torch.where(are_media(rows), 0, rows)


@dataclass(frozen=True)
class MediaTokens:
    """What is known of the tokens :data:`FIRST`, :data:`FIRST` + 1 …, in this order.

    ``features`` [tokens, d] float32 are their embeddings, and ``later`` [tokens, layers, d] float32 is added to their
    states after each of the first layers, mostly of none. ``offsets`` [tokens, rows] are their positions after that of
    the token before the image or sound, and ``steps`` [tokens] how far the position of the next token is beyond that.
    ``block`` [tokens] is the number of their image, and -1 for sounds. ``stand_in`` [tokens] is the token that
    embeddings of each layer are those of, where a model has such. ``both_ways`` [1] is 1 if the tokens of an image
    attend to each other in both directions, and 2 if they do in layers with a window alone (Gemma 4). All of these are
    int32.
    """

    features: F32
    later: F32
    offsets: I32
    steps: I32
    block: I32
    stand_in: I32
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
        if int(self.both_ways[0]) and (window is not None or int(self.both_ways[0]) != WITHIN_WINDOWS):
            block = torch.where(there, self._at(self.block, index), NO_BLOCK)
            allowed = allowed | ((block[:, :, None] == block[:, None]) & (block != NO_BLOCK)[:, :, None])
        return allowed if window is None else allowed & (before < window)

    def embeddings(self, ids: torch.Tensor, model: Any) -> torch.Tensor:
        """The embeddings [batch, seq, d] of ``ids``, of which those of text are the table's of ``model``."""
        there, index = self._index(ids)
        table: torch.Tensor = model.get_input_embeddings()(written(ids))
        features = torch.from_numpy(self.features[index[there].cpu().numpy()])
        return table.clone().masked_scatter(there[..., None], features.to(table))

    def beside(self, ids: torch.Tensor, body: Any) -> dict[str, Any]:
        """What ``body``, a language model, is given for ``ids`` [batch, seq] beside embeddings, positions, masks."""
        there, index = self._index(ids)
        found: dict[str, Any] = {}
        if has_per_layer(body):
            stand_ins = torch.where(there, self._at(self.stand_in, index), ids)
            found[PER_LAYER] = body.get_per_layer_inputs(stand_ins)
        if self.later.shape[1]:
            rows = torch.from_numpy(self.later[index[there].cpu().numpy()]).to(ids.device)
            found |= {PLACES: there, LATER: list(rows.unbind(1))}
        return found

    def given(self, row: I32, model: Any) -> dict[str, NDArray[Any]]:
        """What a graph reads of ``row`` [seq]: embeddings [1, seq, d] float32, and positions of one row or several.

        A model with embeddings of each layer reads these, too, [1, seq, layers, p] float32.
        """
        ids = torch.from_numpy(row.astype(np.int64))[None]
        with torch.inference_mode():
            given = {EMBEDDINGS: self.embeddings(ids, model)}
            given |= {n: v for n, v in self.beside(ids, backbone(model)).items() if n == PER_LAYER}
        found = self.positions(ids).numpy()
        arrays = {name: value.float().cpu().numpy() for name, value in given.items()}
        return {**arrays, POSITIONS: found if len(found) > 1 else found[0]}

    def _index(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        there = are_media(ids)
        return there, torch.where(there, ids - FIRST, 0)

    @staticmethod
    def _at(values: I32, index: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(values).to(index.device)[index]


def masks(media: MediaTokens, ids: torch.Tensor, config: Any, like: torch.Tensor) -> Any:
    """The mask of ``ids`` [batch, seq] as a language model takes it that has its own for each kind of layer.

    0 where a token is attended to, and the lowest number of ``like`` elsewhere.
    """

    def made(window: int | None) -> torch.Tensor:
        allowed = media.may_attend(ids, window)[:, None]
        return torch.zeros(allowed.shape, dtype=like.dtype, device=ids.device).masked_fill(
            ~allowed, torch.finfo(like.dtype).min
        )

    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if not kinds:
        return made(window)
    return {kind: made(window if kind == "sliding_attention" else None) for kind in kinds}


@contextmanager
def seeing(model: Any, media: MediaTokens | None) -> Iterator[None]:
    """Within the block, ``model`` takes rows with tokens of ``media``; without any, nothing is changed."""
    if media is None:
        yield
        return
    body = backbone(model)

    def put_in(args: Any, kwargs: dict[str, Any]) -> Any:
        ids = kwargs.get("input_ids")
        if ids is None or not bool(are_media(ids).any()):
            return None
        embedded = media.embeddings(ids, model)
        given = {**kwargs, "input_ids": None, "inputs_embeds": embedded, **media.beside(ids, body)}
        if media.offsets.shape[1] > 1:
            given["position_ids"] = media.positions(ids)
        if int(media.both_ways[0]):
            given["attention_mask"] = masks(media, ids, model.config.get_text_config(), embedded)
        return args, given

    with Hooks(body) as hooks:
        hooks.before("", put_in, first=True)
        yield


def joined(parts: Sequence[MediaTokens]) -> MediaTokens:
    """The tokens of ``parts``, one after the other."""
    names = [name for name in MediaTokens.__annotations__ if name != "both_ways"]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return MediaTokens(**columns, both_ways=np.max([part.both_ways for part in parts], axis=0))
