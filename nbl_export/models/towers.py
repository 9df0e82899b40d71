"""What a multimodal model's processor and towers make of a text with images: the inputs of its language model.

transformers' own class runs, with its towers, up to its language model, of which the blocks are not loaded. What it
hands over then is held against what :mod:`.image_tokens` derives, for every text: anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nbl_export.batch.image_ids import FIRST
from nbl_export.errors import InputError, MissingDependencyError, first_line
from nbl_export.models.image_tokens import I32, ImageTokens, masks
from nbl_export.models.layers import accepted_arguments
from nbl_export.models.limits import check_built, weights_of
from nbl_export.models.load import load_tokenizer, readable
from nbl_export.models.multimodal import language_model, placeholders_in, towers_only
from nbl_export.models.partial_forward import Reached
from nbl_export.models.quiet import quiet
from nbl_export.models.source import ModelSource

_TEXT_INSTEAD = "calibrate it on text"
# What else a language model is given, which says nothing of images.
_PLAIN = {
    "cache",
    "past_key_values",
    "use_cache",
    "return_dict",
    "cache_position",
    "labels",
    "logits_to_keep",
}
_PLAIN |= {"output_attentions", "output_hidden_states"}


@dataclass(frozen=True)
class Seen:
    """A text with images: its tokens ``ids`` [n], and what is known of those of its images, in their order."""

    ids: I32
    images: ImageTokens


class Towers:
    """The processor and the towers of the multimodal model ``source``.

    Raises :class:`InputError` for a model without a processor, without weights of its towers, or with towers that
    cannot be loaded.
    """

    def __init__(self, source: ModelSource) -> None:
        self._name, self._source = source.wrapper, source.source
        self._processor = load_processor(source)
        self._model = _load(source)
        token = placeholders_in(self._model.config).get("image")
        if token is None:
            raise InputError(
                f"{self._name} names no token in the places of images, so its images are not found: {_TEXT_INSTEAD}."
            )
        self._token = token
        self._tokens = self._blocks = 0

    @torch.inference_mode()
    def read(self, text: str, images: Sequence[Any], where: str) -> Seen:
        """``text`` with ``images`` (of PIL), which begins at ``where``; token numbers go on from one text to the next.

        Raises :class:`InputError` if the processor or the model does not take them, or if the language model is given
        something that cannot be derived of its tokens.
        """
        try:
            with quiet():
                inputs = self._processor(
                    text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=False
                )
                given = self._handed_over(inputs)
        except InputError:
            raise
        except Exception as error:  # a processor's and a model's own code may raise anything
            raise InputError(
                f"{where}: {self._name} does not take this text with {len(images)} "
                f"image{'s' if len(images) != 1 else ''} ({first_line(error)[:300]}): put the placeholder of its "
                "processor once for each image."
            ) from error
        ids = inputs["input_ids"].long()
        if self._token not in ids:
            raise InputError(
                f"{where}: the processor of {self._source} makes no tokens of its images: correct the processor."
            )
        return self._checked(ids, given, where)

    def _handed_over(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        found: list[dict[str, Any]] = []

        def stop(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            found.append(kwargs)
            raise Reached

        hook = language_model(self._model).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with suppress(Reached):
                self._model(**accepted_arguments(self._model, **inputs, use_cache=False))
        finally:
            hook.remove()
        return found[0]

    def _checked(self, ids: torch.Tensor, given: dict[str, Any], where: str) -> Seen:
        """The tokens of ``ids`` [1, n], if the language model is ``given`` what is derived of them."""
        embedded = given.get("inputs_embeds")
        more = sorted(name for name, value in given.items() if value is not None and name not in _PLAIN)
        more = [n for n in more if n not in ("inputs_embeds", "position_ids", "attention_mask")]
        if embedded is None or more:
            what = ", ".join(more) or "no embeddings"
            raise InputError(
                f"{self._name} hands its language model {what} for an image, not its embeddings alone: calibration on "
                f"its images is not supported, {_TEXT_INSTEAD}."
            )
        there = ids[0] == self._token
        begins = there & ~torch.nn.functional.pad(there, (1, 0))[:-1]
        block = self._blocks + begins.cumsum(0)[there] - 1
        marked = ids[0].clone()
        marked[there] = FIRST + torch.arange(int(there.sum()))
        offsets, steps = _offsets(given.get("position_ids"), there, begins)
        images = ImageTokens(
            embedded[0][there].float().numpy(),
            offsets.numpy().astype(np.int32),
            steps.numpy().astype(np.int32),
            block.numpy().astype(np.int32),
            np.array([_looks_ahead(given.get("attention_mask"))], dtype=np.int32),
        )
        if not np.isfinite(images.features).all():
            raise InputError(
                f"{where}: the embeddings of its images are NaN or infinite: check the model's weights."
            )
        self._check_derived(images, marked[None], given, where)
        moved = torch.where(there, marked + self._tokens, marked)
        self._tokens += len(images)
        self._blocks += int(begins.sum())
        return Seen(moved.numpy().astype(np.int32), images)

    def _check_derived(
        self, images: ImageTokens, ids: torch.Tensor, given: dict[str, Any], where: str
    ) -> None:
        wrong = ""
        embedded, positions = given["inputs_embeds"], given.get("position_ids")
        if not torch.equal(images.embeddings(ids, self._model), embedded):
            wrong = "other embeddings of the text"
        if positions is not None:
            rows = positions if positions.ndim == 3 else positions[None]
            expected = images.positions(ids)
            if not torch.equal(rows[-expected.shape[0] :], expected):
                wrong = "positions that do not go on after an image"
        if not wrong and images.both_ways[0]:
            made = masks(images, ids, self._model.config.get_text_config(), embedded)
            found = given["attention_mask"]
            pairs = (
                [(made[kind], found.get(kind)) for kind in made]
                if isinstance(found, dict)
                else [(made, found)]
            )
            if isinstance(found, dict) != isinstance(made, dict) or not all(_same(a, b) for a, b in pairs):
                wrong = "a mask of another kind"
        if wrong:
            raise InputError(
                f"{where}: {self._name} hands its language model {wrong}: calibration on its images is not supported, "
                f"{_TEXT_INSTEAD}."
            )


def _offsets(
    positions: torch.Tensor | None, there: torch.Tensor, begins: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the image tokens ``there``: offsets [tokens, rows] and steps, as in :class:`ImageTokens`."""
    count = int(there.sum())
    if positions is None or positions.ndim == 2:
        return torch.zeros(count, 1), torch.ones(count)
    rows = positions[-3:, 0]
    starts = torch.nonzero(begins)[:, 0].tolist()
    offsets, steps = torch.zeros(len(there), 3), torch.zeros(len(there))
    for start in starts:
        stop = next((i for i in range(start, len(there)) if not there[i]), len(there))
        first = int(rows[:, start - 1].max()) + 1 if start else 0
        inside = rows[:, start:stop] - first
        offsets[start:stop] = inside.T.float()
        after = int(rows[0, stop]) if stop < len(there) else int(rows[:, start:stop].max()) + 1
        steps[stop - 1] = after - first
    return offsets[there], steps[there]


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    return mask if mask.dtype == torch.bool else mask == 0


def _looks_ahead(mask: Any) -> bool:
    """Whether a token may attend to a later one."""
    found = mask.values() if isinstance(mask, dict) else [mask]
    return any(bool(_allowed(m).triu(1).any()) for m in found if m is not None and m.ndim == 4)


def _same(made: torch.Tensor, found: torch.Tensor | None) -> bool:
    return found is not None and torch.equal(_allowed(made), _allowed(found))


def load_processor(source: ModelSource) -> Any:
    """The processor of text and images of ``source``; raises :class:`InputError` if it has none."""
    from transformers import AutoProcessor

    load_tokenizer(source)  # which refuses one that is made to hurt
    with quiet(), readable(source) as path:
        try:
            # Not None: transformers would ask whether its code may run.
            processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        except Exception as error:
            if find_spec("torchvision") is None:
                raise MissingDependencyError(
                    f"The processor of {source.source} cannot be loaded, and torchvision, which most processors need, "
                    "is not there: pip install torchvision."
                ) from error
            raise InputError(
                f"No processor of images can be loaded from {source.source} ({first_line(error)[:300]}): add the "
                f"processor's files that the model was trained with, or {_TEXT_INSTEAD}."
            ) from error
    if not hasattr(processor, "image_processor"):
        raise InputError(
            f"{source.source} has no processor of images (preprocessor_config.json, processor_config.json): add the "
            f"one that the model was trained with, or {_TEXT_INSTEAD}."
        )
    return processor


def _load(source: ModelSource) -> Any:
    from transformers import AutoConfig

    kind = towers_only(source.wrapper)
    with quiet(), readable(source) as path:
        try:
            with torch.device("meta"):
                check_built(
                    source.source, kind(AutoConfig.from_pretrained(path)), weights_of(Path(source.path))
                )
            model, info = kind.from_pretrained(
                path, output_loading_info=True, use_safetensors=True, dtype=torch.float32
            )
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"transformers cannot load the towers of {source.source} ({first_line(error)[:300]}): {_TEXT_INSTEAD}."
            ) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{source.source} has no weights for {missing[0]} and {len(missing) - 1} more, which its images need: "
            f"download the model again, or {_TEXT_INSTEAD}."
        )
    return model.eval().requires_grad_(False)
