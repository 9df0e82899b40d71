"""What a multimodal model's processor and towers make of images: the inputs of its language model.

transformers' own class runs, with its towers, up to its language model, of which the blocks are not loaded. What it
hands over then is held against what :mod:`.media_tokens` derives, for every text: anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from nbl_export.batch import FIRST, PER_LAYER
from nbl_export.errors import InputError, MissingDependencyError, first_line
from nbl_export.models.load import load_beside
from nbl_export.models.media_tokens import (
    I32,
    LATER,
    NO_BLOCK,
    PLACES,
    WITHIN_WINDOWS,
    MediaTokens,
    masks,
)
from nbl_export.models.multimodal import Absent, entry, language_model, placeholders, towers_only
from nbl_export.models.running import Hooks, accepted_arguments, quiet
from nbl_export.models.source import ModelSource
from nbl_export.models.stored import opened
from nbl_export.models.walk import Reached
from nbl_export.packages import part

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
_PLAIN |= {"output_attentions", "output_hidden_states", "position_embeddings"}
_HANDLED = {"inputs_embeds", "position_ids", "attention_mask", PER_LAYER, PLACES, LATER}


class Towers:
    """The processor and the towers of the multimodal model ``source``.

    Raises :class:`InputError` for a model without a processor, without weights of its towers, or with towers that
    cannot be loaded.
    """

    def __init__(self, source: ModelSource) -> None:
        self._name, self._source = source.wrapper, source.source
        self._processor = load_processor(source)
        self._model = _load(source)
        self._tokens = placeholders(self._model)
        if not self._tokens:
            raise InputError(
                f"{self._name} names no token in the places of images, so they are not found: "
                f"{_TEXT_INSTEAD}."
            )
        self._seen = self._blocks = 0

    @torch.inference_mode()
    def read(self, text: str, images: Sequence[Any], where: str) -> tuple[I32, MediaTokens]:
        """The tokens [n] of ``text``, which begins at ``where``, with ``images`` (of PIL), and what is known of theirs.

        The numbers of tokens go on from one text to the next. Raises :class:`InputError` if the processor or the model
        does not take them, or if the language model is given something that cannot be derived of its tokens.
        """
        why = ""
        if images and any(isinstance(module, Absent) for module in self._model.modules()):
            why = f"the tower of images of {self._name} is of timm, and is not there: {part('timm').pip}"
        elif images and not hasattr(self._processor, "image_processor"):
            why = (
                f"{self._source} has no processor of images (preprocessor_config.json, processor_config.json): add the "
                "one that the model was trained with"
            )
        if why:
            raise InputError(f"{where}: {why}, or {_TEXT_INSTEAD}.")
        options: dict[str, Any] = {"images": [list(images)]} if images else {}
        try:
            with quiet():
                inputs = self._processor(
                    text=[text], return_tensors="pt", add_special_tokens=False, **options
                )
                given = self._handed_over(inputs)
        except Exception as error:  # a processor's and a model's own code may raise anything
            raise InputError(
                f"{where}: {self._name} does not take this text with its images "
                f"({first_line(error)[:300]}): put the placeholder of its processor once for each, and leave out what "
                "it does not take."
            ) from error
        ids = inputs["input_ids"].long()
        if images and self._tokens.get("image") not in ids:
            raise InputError(
                f"{where}: the processor of {self._source} makes no tokens of its images: correct the processor."
            )
        return self._checked(ids, given, where)

    def _handed_over(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        path, name = entry(self._model)

        def stop(args: Any, kwargs: dict[str, Any]) -> None:
            found.update({**kwargs, **({name: args[0]} if args else {})})
            raise Reached

        # Processors give numbers as they like, Llama 4's bfloat16.
        numbers = {
            key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in inputs.items()
        }
        with Hooks(self._model) as hooks, suppress(Reached):
            hooks.before(path, stop)
            self._model(**accepted_arguments(self._model, **numbers, use_cache=False))
        found["inputs_embeds"] = found.pop(name, None)
        return found

    def _checked(self, ids: torch.Tensor, given: dict[str, Any], where: str) -> tuple[I32, MediaTokens]:
        """The tokens of ``ids`` [1, n], if the language model is ``given`` what is derived of them."""
        embedded = given["inputs_embeds"]
        more = sorted(n for n, value in given.items() if value is not None and n not in _PLAIN | _HANDLED)
        if embedded is None or more:
            what = ", ".join(more) or "no embeddings"
            raise InputError(
                f"{self._name} hands its language model {what} for an image, which is not known: "
                f"calibration on them is not supported, {_TEXT_INSTEAD}."
            )
        kinds = ids[0]
        # Placeholders, and what marks their ends, if it is embedded by a tower, as in Gemma 3n.
        held = torch.isin(kinds, torch.tensor(list(self._tokens.values())))
        table: torch.Tensor = self._model.get_input_embeddings()(torch.where(held, 0, kinds))
        beside = torch.nn.functional.pad(held, (1, 0))[:-1] | torch.nn.functional.pad(held, (0, 1))[1:]
        there = held | (beside & (table != embedded[0]).any(-1))
        begins = there & (kinds != torch.nn.functional.pad(kinds, (1, 0), value=-1)[:-1])
        block = torch.where(
            kinds == self._tokens.get("image", -1), self._blocks + begins.cumsum(0) - 1, NO_BLOCK
        )[there]
        marked = ids[0].clone()
        marked[there] = FIRST + torch.arange(int(there.sum()))
        offsets, steps = _offsets(given.get("position_ids"), there, begins)
        media = MediaTokens(
            embedded[0][there].float().numpy(),
            _later(given, there, embedded).numpy(),
            offsets.numpy().astype(np.int32),
            steps.numpy().astype(np.int32),
            block.numpy().astype(np.int32),
            self._stand_ins(kinds, there, given).numpy().astype(np.int32),
            np.array([_both_ways(given.get("attention_mask"))], dtype=np.int32),
        )
        if not all(np.isfinite(rows).all() for rows in (media.features, media.later)):
            raise InputError(
                f"{where}: the embeddings of its images are NaN or infinite: check the model's weights."
            )
        self._check_derived(media, marked[None], given, where)
        moved = torch.where(there, marked + self._seen, marked)
        self._seen += len(media)
        self._blocks += int(begins.sum())
        return moved.numpy().astype(np.int32), media

    def _stand_ins(self, ids: torch.Tensor, there: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        """The tokens whose embeddings of each layer the media tokens of ``ids`` [n] have; their own, if there are none.

        Models look up these tokens themselves, the padding token, or the first one.
        """
        rows, found = given.get(PER_LAYER), ids[there]
        if rows is None:
            return found
        body = language_model(self._model)
        for instead in (getattr(body.config, "pad_token_id", None), 0):
            tried = torch.full_like(found, instead or 0)
            if torch.equal(body.get_per_layer_inputs(tried[None])[0], rows[0][there]):
                return tried
        return found

    def _check_derived(
        self, media: MediaTokens, ids: torch.Tensor, given: dict[str, Any], where: str
    ) -> None:
        embedded, positions, expected = (
            given["inputs_embeds"],
            given.get("position_ids"),
            media.positions(ids),
        )
        beside = media.beside(ids, language_model(self._model))
        rows = positions[None] if positions is not None and positions.ndim == 2 else positions
        own = _allowed(given.get("attention_mask"))
        made = _allowed(masks(media, ids, self._model.config.get_text_config(), embedded))
        causal = torch.ones(1, 1, *2 * ids.shape[1:], dtype=torch.bool).tril()
        derived = {
            "other embeddings of the text": torch.equal(media.embeddings(ids, self._model), embedded),
            **{
                f"{name} that are not those of its tokens": _equal(beside.get(name), given.get(name))
                for name in (PER_LAYER, PLACES)
            },
            "positions that do not go on after an image": rows is None
            or torch.equal(rows[-expected.shape[0] :], expected),
            # A model that is given none makes it itself; none for a kind of layers is a causal one.
            "a mask of another kind": own == {"": None}
            or (
                own.keys() == made.keys()
                and all(_equal(mask, causal if own[k] is None else own[k]) for k, mask in made.items())
            ),
        }
        if wrong := [what for what, same in derived.items() if not same]:
            raise InputError(
                f"{where}: {self._name} hands its language model {wrong[0]}: calibration on its images is "
                f"not supported, {_TEXT_INSTEAD}."
            )


def _later(given: dict[str, Any], there: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What is added to the states of the tokens ``there`` after the first layers, [tokens, layers, d]."""
    layers = given.get(LATER) or ()
    found = torch.zeros(len(there), len(layers), like.shape[-1])
    for index, rows in enumerate(layers):
        found[given[PLACES][0], index] = rows.float()
    return found[there]


def _offsets(
    positions: torch.Tensor | None, there: torch.Tensor, begins: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the media tokens ``there``: offsets [tokens, rows] and steps, as in :class:`MediaTokens`."""
    count = int(there.sum())
    if positions is None or positions.ndim == 2:
        return torch.zeros(count, 1), torch.ones(count)
    rows = positions[-3:, 0]
    offsets, steps = torch.zeros(len(there), 3), torch.zeros(len(there))
    for start in torch.nonzero(begins)[:, 0].tolist():
        stop = next((i for i in range(start + 1, len(there)) if not there[i] or begins[i]), len(there))
        first = int(rows[:, start - 1].max()) + 1 if start else 0
        inside = rows[:, start:stop] - first
        offsets[start:stop] = inside.T.float()
        after = int(rows[0, stop]) if stop < len(there) else int(rows[:, start:stop].max()) + 1
        steps[stop - 1] = after - first
    return offsets[there], steps[there]


def _equal(made: torch.Tensor | None, found: torch.Tensor | None) -> bool:
    return made is found if made is None or found is None else torch.equal(made, found)


def _allowed(mask: Any) -> dict[str, torch.Tensor | None]:
    """What a ``mask`` lets each kind of layer attend to; None where it leaves that to the model."""
    return {
        kind: None
        if one is None or (one.ndim == 2 and one.all())
        else one
        if one.dtype == torch.bool
        else one == 0
        for kind, one in (mask if isinstance(mask, dict) else {"": mask}).items()
    }


def _both_ways(mask: Any) -> int:
    """In which layers a token may attend to a later one, as in :class:`MediaTokens`."""
    ahead = [m is not None and bool(m.triu(1).any()) for m in _allowed(mask).values()]
    return (1 if all(ahead) else WITHIN_WINDOWS) if any(ahead) else 0


def load_processor(source: ModelSource) -> Any:
    """The processor of ``source``, of text with images; raises :class:`InputError` if it has none."""
    try:
        return load_beside(replace(source, trust_remote_code=False), "AutoProcessor", "processor")
    except InputError as error:
        if find_spec("torchvision") is None:
            raise MissingDependencyError(
                f"The processor of {source.source} cannot be loaded, and torchvision, which most processors need, is "
                f"not there: {part('torchvision').pip}."
            ) from error
        raise


def _load(source: ModelSource) -> Any:
    with opened(source, "transformers cannot load the towers of") as (path, options):
        model, info = towers_only(source.wrapper).from_pretrained(
            path, output_loading_info=True, use_safetensors=True, dtype=torch.float32, **options
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{source.source} has no weights for {missing[0]} and {len(missing) - 1} more, which its towers need: "
            f"download the model again, or {_TEXT_INSTEAD}."
        )
    return model.eval().requires_grad_(False)
