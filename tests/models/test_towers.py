"""What towers make of texts with images: tokens that a language model gets the same of, by hand too, or a refusal."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.batch import FIRST, are_media
from nbl_export.calibrate.collect import collect_moments
from nbl_export.calibrate.moments import Moments
from nbl_export.errors import InputError
from nbl_export.models import towers
from nbl_export.models.media_tokens import (
    MediaTokens,
    joined,
    masks,
    seeing,
)
from nbl_export.models.multimodal import language_model
from nbl_export.models.source import find_model
from nbl_export.models.towers import Towers, load_processor
from nbl_export.models.walk import Reached
from tests.fixtures_graph import load
from tests.multimodal import whole
from tests.pictures import PLACE, picture, save_processor, skip_without
from tests.processes import edit

END = 257


def base(name: str) -> str:
    """The model that has the processor of the model ``name``."""
    return name.removesuffix("-both-ways")


@pytest.fixture(scope="module")
def folder_of(
    wrapper_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a tiny model with its processor."""
    root = tmp_path_factory.mktemp("seeing")

    def made(name: str) -> Path:
        skip_without(base(name))
        if not (root / name).exists():
            shutil.copytree(wrapper_folder(name), root / name)
            save_processor(base(name), root / name)
        return root / name

    return made


def texts(name: str) -> list[tuple[str, list[Any]]]:
    """Two documents with an image of its own size each, and one with two."""
    pictures = [picture(i, size) for i, size in enumerate([(40, 30), (60, 90), (90, 40), (40, 30)])]
    place = PLACE[name]
    return [
        (f"A small one {place} is here.", pictures[:1]),
        (f"{place} came first.", pictures[1:2]),
        (f"Two: {place} and {place} again", pictures[2:]),
    ]


def independent(name: str, folder: Path) -> dict[int, dict[str, Any]]:
    """Sums of each layer over one text of all documents, by transformers' own class with its towers in float64."""
    dtype = torch.float32 if base(name) in SINGLE else torch.float64
    model = whole(name, dtype=dtype)
    found = texts(base(name))
    text = "".join(f"{text}</s>" for text, _ in found)
    inputs = load_processor(find_model(str(folder)))(
        text=[text],
        return_tensors="pt",
        add_special_tokens=False,
        images=[[one for _, images in found for one in images]],
    )
    numbers = {k: v.to(dtype) if v.is_floating_point() else v for k, v in dict(inputs).items()}
    sums: dict[int, dict[str, Any]] = {}

    def record(index: int, kwargs: dict[str, Any], output: Any) -> None:
        x, y = (t[0].double() for t in (kwargs["hidden_states"], output[0]))
        sums[index] = {"n": len(x), "x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "yx": y.T @ x}
        if index == len(layers) - 1:
            raise Reached  # Llama 4's own class fails after its head

    body = language_model(model)
    layers = getattr(body, "model", body).layers
    for index, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(
            lambda _m, _a, kwargs, output, index=index: record(index, kwargs, output), with_kwargs=True
        )
    with torch.inference_mode(), suppress(Reached):
        model(**numbers)
    return sums


# Towers that do not run in float64, or that place patches by numbers that it rounds otherwise.
SINGLE = ("gemma4", "phi4-multimodal")
# What must move the moments, of models of which it says something.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "features": lambda rows: -rows[::-1],
    "later": np.zeros_like,
    "offsets": np.zeros_like,
    "stand_in": lambda tokens: np.full_like(tokens, 7),
    "both_ways": np.zeros_like,
}
CASES = [
    ("llava", set()),
    ("llava-next", set()),
    ("mistral3", set()),
    ("idefics3", set()),
    ("internvl", set()),
    ("llama4", set()),
    ("gemma3", {"both_ways"}),
    ("gemma4", {"stand_in"}),
    ("gemma4-both-ways", {"both_ways"}),
    ("gemma3n-timm", {"stand_in"}),
    ("qwen2-vl", {"offsets"}),
    ("qwen2.5-vl", {"offsets"}),
    ("qwen3-vl", {"offsets", "later"}),
    ("glm4v", {"offsets"}),
    ("phi4-multimodal", set()),
]


@pytest.mark.parametrize(("name", "says"), CASES)
def test_moments_are_those_of_the_whole_model(
    name: str, says: set[str], folder_of: Callable[[str], Path]
) -> None:
    """Three documents in one row: positions go on after each image, and masks are those of the wrapper."""
    folder = folder_of(name)
    towers_of = Towers(find_model(str(folder)))
    seen = [towers_of.read(*document, "here") for document in texts(base(name))]
    media = joined([known for _, known in seen])
    row = np.concatenate([np.append(ids, END) for ids, _ in seen]).astype(np.int32)
    assert np.array_equal(row[are_media(row)], FIRST + np.arange(len(media)))
    model = load(folder)
    with seeing(model, media):
        found = collect_moments(model, row[None])
    expected = independent(name, folder)
    assert found.layers and found.layers.keys() <= expected.keys()
    for index, layer in found.layers.items():
        assert layer.n == expected[index].pop("n") == len(row)
        for key, value in expected[index].items():
            size = float(value.abs().max())
            np.testing.assert_allclose(getattr(layer, key), value.numpy(), rtol=0, atol=2e-5 * size)
    # Without its images the model does not take the row, and with others the moments are others.
    with pytest.raises(Exception, match=r"index|range"):
        collect_moments(model, row[None])
    for key, change in CHANGES.items():
        values = getattr(media, key)
        if key in {"features"} | says:
            with seeing(model, replace(media, **{key: change(values)})):
                moved = collect_moments(model, row[None])
            assert distance(moved, found) > 2e-4, key
        else:
            assert key == "stand_in" or not values.any()


def distance(moved: Moments, found: Moments) -> float:
    """The largest change of an entry of a layer's inputs and outputs, as a part of the largest."""
    pairs = [(moved.layers[i].yx, layer.yx) for i, layer in found.layers.items()]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.parametrize(
    ("name", "text", "images", "words"),
    [
        ("llava", "<image>", 2, "does not take this text with its images ("),
        ("gemma3", "no place", 1, "put the placeholder of its processor once for each"),
        ("qwen3-vl", "<|image_pad|> and <|image_pad|>", 1, "does not take this text with its images ("),
        ("qwen2-audio", "", 1, "has no processor of images"),
        ("gemma3n", "", 1, "is of timm, and is not there: pip install timm"),
    ],
)
def test_images_that_a_model_does_not_take_are_refused(
    name: str, text: str, images: int, words: str, folder_of: Callable[[str], Path]
) -> None:
    found = Towers(find_model(str(folder_of(name))))
    with pytest.raises(InputError) as caught:
        found.read(text, [picture(i) for i in range(images)], "rows.jsonl, line 3")
    assert str(caught.value).startswith("rows.jsonl, line 3: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda given: {"more": given["inputs_embeds"]},
            "model more for an image, which is not known",
        ),
        (lambda given: {"inputs_embeds": None}, "no embeddings for an image, which is not known"),
        (lambda given: {"inputs_embeds": given["inputs_embeds"] + 1}, "other embeddings of the text"),
        (lambda given: {"inputs_embeds": given["inputs_embeds"] * math.nan}, "NaN or infinite"),
        (lambda given: {"position_ids": given["position_ids"] + 1}, "positions that do not go on"),
        (
            lambda given: {"visual_pos_masks": ~given["visual_pos_masks"]},
            "visual_pos_masks that are not those",
        ),
        (lambda given: {"attention_mask": given["attention_mask"] * 0}, "a mask of another kind"),
    ],
)
def test_what_embeddings_alone_do_not_say_is_refused(
    change: Callable[[Any], dict[str, Any]],
    words: str,
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anything else than what is derived of the tokens."""
    found = Towers(find_model(str(folder_of("qwen3-vl"))))
    own = found._handed_over

    def other(inputs: Any) -> dict[str, Any]:
        given = own(inputs)
        return {**given, **change(given)}

    monkeypatch.setattr(found, "_handed_over", other)
    with pytest.raises(InputError, match=words) as caught:
        found.read(*texts("qwen3-vl")[0], "here")
    assert "Qwen3VLForConditionalGeneration" in str(caught.value) or str(caught.value).startswith("here: ")


def test_a_processor_with_code_of_its_own_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked, and nothing of it runs."""
    folder = Path(shutil.copytree(folder_of("llava"), tmp_path / "model"))
    code = {"AutoProcessor": "own.Own"}
    edit(folder / "processor_config.json", lambda config: config.update(auto_map=code))
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    monkeypatch.undo()
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(towers, "find_spec", lambda _name: object())
    found = towers.load_processor(find_model(str(folder)))
    assert type(found).__module__.startswith("transformers.")  # the one that the model's type has


# tokens -------------------------------------------------------------------------------------------


# Two images: of 2 x 2, after which the text goes on two further, and of 1 x 3.
OFFSETS = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1], [0, 0, 2]]


def tokens(both_ways: int = 0) -> MediaTokens:
    return MediaTokens(
        features=np.arange(14, dtype=np.float32).reshape(7, 2),
        later=np.zeros((7, 0, 2), np.float32),
        offsets=np.array(OFFSETS, dtype=np.int32),
        steps=np.array([0, 0, 0, 2, 0, 0, 3], dtype=np.int32),
        block=np.array([0, 0, 0, 0, 1, 1, 1], dtype=np.int32),
        stand_in=np.array([3, 3, 3, 3, 4, 4, 4], dtype=np.int32),
        both_ways=np.array([both_ways], dtype=np.int32),
    )


def ids(*given: int) -> torch.Tensor:
    return torch.tensor([[FIRST - 1 - i if i < 0 else i for i in given]])


def test_positions_go_on_after_the_longest_side_of_an_image() -> None:
    found = tokens().positions(ids(5, -1, -2, -3, -4, 6, 7, -5, -6, -7, 8))
    assert found[:, 0].tolist() == [
        [0, 1, 1, 1, 1, 3, 4, 5, 5, 5, 8],
        [0, 1, 1, 2, 2, 3, 4, 5, 5, 5, 8],
        [0, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8],
    ]
    assert tokens().positions(ids(4, 5, 6)).tolist() == [[[0, 1, 2]]] * 3


def test_an_image_is_seen_in_both_directions_where_it_is_so() -> None:
    row = ids(5, -1, -2, -3, -4, 6, -5, -6, -7)
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    assert torch.equal(tokens().may_attend(row)[0], causal)
    expected = causal.clone()
    expected[1:5, 1:5] = expected[6:9, 6:9] = True
    assert torch.equal(tokens(1).may_attend(row)[0], expected)
    near = torch.arange(9)[:, None] - torch.arange(9) < 3
    assert torch.equal(tokens(1).may_attend(row, 3)[0], expected & near)
    config = SimpleNamespace(layer_types=["sliding_attention", "full_attention"], sliding_window=3)
    found = masks(tokens(1), row, config, torch.zeros(0))
    assert torch.equal(found["full_attention"][0, 0] == 0, expected)
    assert torch.equal(found["sliding_attention"][0, 0] == 0, expected & near)
    assert found["full_attention"].min() == torch.finfo(torch.float32).min
    assert masks(tokens(1), row, SimpleNamespace(), torch.zeros(0)).shape == (1, 1, 9, 9)


class Body(torch.nn.Module):
    """A language model with embeddings of each layer: those of a token are its number."""

    config = SimpleNamespace(hidden_size_per_layer_input=1)

    def get_per_layer_inputs(self, ids: torch.Tensor) -> torch.Tensor:
        return ids[..., None, None].float()

    def forward(self, **given: Any) -> dict[str, Any]:
        return given


def test_what_is_given_beside_embeddings() -> None:
    """Embeddings of each layer are those of a stand-in; what is added later is in the order of the tokens."""
    row = ids(5, -7, -2, 8)
    plain = SimpleNamespace(config=SimpleNamespace())
    assert tokens().beside(row, plain) == {}
    assert tokens().beside(row, Body())["per_layer_inputs"][0, :, 0, 0].tolist() == [5, 4, 3, 8]
    later = np.arange(28, dtype=np.float32).reshape(7, 2, 2)
    found = replace(tokens(), later=later).beside(row, plain)
    assert found["visual_pos_masks"].tolist() == [[False, True, True, False]]
    first, second = found["deepstack_visual_embeds"]
    assert first.tolist() == [[24, 25], [4, 5]] and second.tolist() == [[26, 27], [6, 7]]


def test_tokens_of_several_documents_are_one_table() -> None:
    found = joined([tokens(), replace(tokens(1), block=tokens().block + 2)])
    assert len(found) == 14 and found.block.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    assert found.both_ways.tolist() == [1] and found.later.shape == (14, 0, 2)
