"""What towers and processors make of texts with images: tokens that a language model gets the same of, or a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nbl_export.batch.media_ids import FIRST, are_media
from nbl_export.calibrate.collect import collect_moments
from nbl_export.errors import InputError
from nbl_export.models import towers
from nbl_export.models.media_tokens import MediaTokens, joined, seeing
from nbl_export.models.source import find_model
from nbl_export.models.towers import Seen, Towers
from tests.fixtures_graph import load
from tests.multimodal import whole
from tests.pictures import PLACE, QwenProcessor, load_processor, picture, save_processor

END = 257


@pytest.fixture(scope="module")
def folder_of(
    wrapper_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a tiny model with its processor."""
    root = tmp_path_factory.mktemp("seeing")

    def made(name: str) -> Path:
        if not (root / name).exists():
            shutil.copytree(wrapper_folder(name), root / name)
            save_processor(name, root / name)
        return root / name

    return made


@pytest.fixture(autouse=True)
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "load_processor", load_processor)


def texts(name: str) -> list[tuple[str, list[Any]]]:
    """Two documents with an image of its own size each, and one with two."""
    place = PLACE[name]
    return [
        (f"A small one {place} is here.", [picture(0)]),
        (f"{place} came first.", [picture(1, (60, 90))]),
        (f"Two: {place} and {place} again", [picture(2, (90, 40)), picture(3)]),
    ]


def read_all(found: Towers, name: str) -> list[Seen]:
    return [found.read(text, images, [], "here") for text, images in texts(name)]


def independent(name: str, folder: Path) -> dict[int, dict[str, Any]]:
    """Sums of each layer over one text of all documents, by transformers' own class with its towers in float64."""
    model = whole(name, dtype=torch.float64)
    processor = load_processor(find_model(str(folder)))
    parts: dict[str, list[torch.Tensor]] = {}
    for text, images in texts(name):
        given = dict(processor(text=[text], images=[images], return_tensors="pt", add_special_tokens=False))
        for key, value in given.items():
            if value.shape[0] == 1 and value.ndim == 2 and key != "image_grid_thw":  # of tokens: with the end
                last = END if key == "input_ids" else int(key == "attention_mask")
                value = torch.cat([value, value.new_full((1, 1), last)], 1)
            parts.setdefault(key, []).append(value)
    inputs = {key: torch.cat(v, 0 if "pixel" in key or "grid" in key else 1) for key, v in parts.items()}
    inputs["pixel_values"] = inputs["pixel_values"].double()
    sums: dict[int, dict[str, Any]] = {}

    def record(index: int, kwargs: dict[str, Any], output: Any) -> None:
        x, y = (t[0].double() for t in (kwargs["hidden_states"], output[0]))
        sums[index] = {"n": len(x), "x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "yx": y.T @ x}

    layers = next(m for m in model.model.language_model.modules() if isinstance(m, torch.nn.ModuleList))
    for index, layer in enumerate(layers):
        layer.self_attn.register_forward_hook(
            lambda _m, _a, kwargs, output, index=index: record(index, kwargs, output), with_kwargs=True
        )
    with torch.inference_mode():
        model(**inputs)
    return sums


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2.5-vl"])
def test_moments_are_those_of_the_whole_model(name: str, folder_of: Callable[[str], Path]) -> None:
    """Three documents in one row: positions go on after each image, and masks are those of the wrapper."""
    folder = folder_of(name)
    seen = read_all(Towers(find_model(str(folder))), name)
    images = joined([one.media for one in seen])
    assert len(set(images.block.tolist())) == 4 and bool(images.both_ways[0]) == (name == "gemma3")
    row = np.concatenate([np.append(one.ids, END) for one in seen]).astype(np.int32)
    assert np.array_equal(row[are_media(row)], FIRST + np.arange(len(images)))
    model = load(folder)
    with seeing(model, images):
        found = collect_moments(model, row[None])
    expected = independent(name, folder)
    assert found.layers.keys() == expected.keys()
    for index, layer in found.layers.items():
        assert layer.n == expected[index].pop("n") == len(row)
        for key, value in expected[index].items():
            size = float(value.abs().max())
            np.testing.assert_allclose(getattr(layer, key), value.numpy(), rtol=0, atol=2e-5 * size)
    # Without its images the model does not take the row, and with others the moments are others.
    with pytest.raises(Exception, match=r"index|range"):
        collect_moments(model, row[None])
    other = MediaTokens(**{**vars(images), "features": images.features[::-1].copy()})
    with seeing(model, other):
        moved = collect_moments(model, row[None])
    assert np.abs(moved.layers[3].yx - found.layers[3].yx).max() > 1e-3 * np.abs(found.layers[3].yx).max()


def test_no_block_of_the_language_model_is_read(folder_of: Callable[[str], Path]) -> None:
    found = Towers(find_model(str(folder_of("llava"))))._model
    names = [name for name, _ in found.named_parameters()]
    assert any("vision_tower" in name for name in names)
    assert not any("language_model.layers" in name for name in names)


@pytest.mark.parametrize(
    ("name", "text", "images", "words"),
    [
        ("llava", "<image> and <image>", 1, "does not take this text with 1 image ("),
        ("llava", "no place", 1, "does not take this text with 1 image ("),
        ("llava", "<image>", 2, "does not take this text with 2 images ("),
        ("gemma3", "<start_of_image>", 2, "does not take this text with 2 images ("),
        ("gemma3", "no place", 1, "put the placeholder of its processor once for each"),
        ("qwen2.5-vl", "no place", 1, "put the placeholder of its processor once for each"),
    ],
)
def test_other_numbers_of_places_and_of_images_are_refused(
    name: str, text: str, images: int, words: str, folder_of: Callable[[str], Path]
) -> None:
    found = Towers(find_model(str(folder_of(name))))
    with pytest.raises(InputError) as caught:
        found.read(text, [picture(i) for i in range(images)], [], "rows.jsonl, line 3")
    assert str(caught.value).startswith("rows.jsonl, line 3: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_processor_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(folder_of("llava"), tmp_path / "model"))
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    monkeypatch.undo()
    monkeypatch.setattr(towers, "find_spec", lambda _name: object())  # with and without torchvision
    with pytest.raises(InputError, match=r"processor of images or sounds.* calibrate it on text"):
        Towers(find_model(str(folder)))


def test_a_processor_with_code_of_its_own_is_refused(
    folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked, and nothing of it runs."""
    folder = Path(shutil.copytree(folder_of("llava"), tmp_path / "model"))
    path = folder / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoProcessor": "own.Own"}}))
    (folder / "own.py").write_text("raise SystemExit('it ran')")
    monkeypatch.undo()
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    monkeypatch.setattr(towers, "find_spec", lambda _name: object())
    found = towers.load_processor(find_model(str(folder)))
    assert type(found).__module__.startswith("transformers.")  # the one that the model's type has


def test_towers_without_weights_are_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(folder_of("llava"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "multi_modal_projector" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"has no weights for model\.multi_modal_projector.* and 3 more"):
        Towers(find_model(str(folder)))


@pytest.mark.parametrize("name", ["qwen3-vl", "phi4-multimodal"])
def test_what_embeddings_alone_do_not_say_is_refused(
    name: str,
    wrapper_folder: Callable[[str], Path],
    folder_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Features between the layers, towers that are a part of the language model."""
    folder = wrapper_folder(name)
    monkeypatch.setattr(towers, "load_processor", lambda _source: QwenProcessor(folder_of("qwen2.5-vl"), 16))
    with pytest.raises(InputError, match="calibrate it on text") as caught:
        Towers(find_model(str(folder))).read(texts("qwen2.5-vl")[0][0], texts("qwen2.5-vl")[0][1], [], "here")
    assert json.loads((folder / "config.json").read_text())["architectures"][0] in str(caught.value)
